/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Addresses: IPv4 and IPv6 in one form. */
#ifndef MYCEL_ADDRESS_H
#define MYCEL_ADDRESS_H

#include "lib/helpers.h"

/* Word by word: the verifier wants what lies on the stack read with its own alignment. */
inline_always bool is_same_address(const struct address *one, const struct address *other)
{
	return !((one->word[0] ^ other->word[0]) | (one->word[1] ^ other->word[1]) |
		 (one->word[2] ^ other->word[2]) | (one->word[3] ^ other->word[3]));
}

/* None, or "this host" of IPv6. */
inline_always bool is_none(const struct address *address)
{
	return !(address->word[0] | address->word[1] | address->word[2] | address->word[3]);
}

inline_always bool is_ipv4(const struct address *address)
{
	return !(address->word[0] | address->word[1] | (address->word[2] ^ bpf_htonl(0xffff)));
}

/* 0.0.0.0 or ::, which a socket takes for its own host. */
inline_always bool is_this_host(const struct address *address)
{
	return is_none(address) || (is_ipv4(address) && !address->word[3]);
}

inline_always void set_ipv4(struct address *address, __be32 ipv4)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = bpf_htonl(0xffff);
	address->word[3] = ipv4;
}

inline_always void set_ipv6(struct address *address, __be32 w0, __be32 w1, __be32 w2, __be32 w3)
{
	address->word[0] = w0;
	address->word[1] = w1;
	address->word[2] = w2;
	address->word[3] = w3;
}

/* 127.0.0.0/8 or ::1. */
inline_always bool is_loopback(const struct address *address)
{
	if (is_ipv4(address))
		return (address->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !(address->word[0] | address->word[1] | address->word[2] | (address->word[3] ^ bpf_htonl(1)));
}

/* The pod's own address of the same family as another one; perhaps none. */
inline_always const struct address *own_address(const struct pod *pod, const struct address *other)
{
	return is_ipv4(other) ? &pod->address4 : &pod->address6;
}

#endif
