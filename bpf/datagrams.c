/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * sendmsg() and recvmsg() of UDP sockets in enrolled pods: a datagram to a service goes to one of its endpoints, and what
 * comes back from there seems to come from the service. IPv4 of an IPv6 socket goes out by sendmsg4 and comes in by recvmsg6.
 */
#include "lib/datagrams.h"

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return direct4(ctx, false);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return direct6(ctx, false);
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	answer_as_dialled4(ctx);
	return 1;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	answer_as_dialled6(ctx);
	return 1;
}
