/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * socket() in enrolled pods. An MPTCP socket's subflows are dialled by the kernel, past connect4: they would leave the pod
 * as they are. Who asks for MPTCP falls back to TCP when it is not there.
 */
#include "lib/helpers.h"
#include "lib/refusal.h"

int sock_create(struct bpf_sock *ctx)
{
	if (ctx->protocol != IPPROTO_MPTCP)
		return 1;
	u64 netns = netns_cookie(ctx);
	struct pod *pod = map_lookup(MAP(PODS), &netns);

	if (!pod || (pod->flags & POD_PASSING))
		return 1;
	struct refusal refusal = { .tuple = { .client_address = pod->address4 }, .reason = REASON_MPTCP };

	count(REASON_MPTCP);
	if (!was_told(&refusal, DIAL_NS))
		tell(netns, &refusal.tuple, REASON_MPTCP, pod->identity, 0);
	set_retval(-EPROTONOSUPPORT);
	return 0;
}
