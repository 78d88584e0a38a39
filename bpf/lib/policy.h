/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The verdict on what comes to a pod of this node, from the tables that the agent compiled: AuthorizationPolicy and mTLS mode
 * (policies, classes), and NetworkPolicy (networks).
 */
#ifndef MYCEL_POLICY_H
#define MYCEL_POLICY_H

#include "lib/address.h"
#include "lib/helpers.h"

#define ADDRESS_BITS 128

/* Of the source's address, in the policy of that generation; 0 when it is in none. */
inline_always u16 class_of(u64 netns, u32 generation, const struct address *source)
{
	struct class_key key = {
		.prefix_length = CLASS_PREFIX_BITS + ADDRESS_BITS,
		.generation = generation,
		.netns = netns,
		.address = *source,
	};
	u32 *found = map_lookup(MAP(CLASSES), &key);

	return found ? (u16)*found : 0;
}

/* 0 when allowed, else the reason. The generation is that of the table that was asked. */
inline_always u32 judge(u64 netns, u32 identity, const struct address *source, __be16 port, u32 *generation)
{
	struct policy_key key = { .identity = POLICY_GENERATION };
	void *policy = map_lookup(MAP(POLICIES), &netns);
	u32 *verdict, flags = 0;

	*generation = 0;
	if (!policy)
		return REASON_NO_POLICY;
	verdict = map_lookup(policy, &key);
	if (verdict) {
		flags = *verdict;
		*generation = flags & POLICY_GENERATION_MASK;
	}
	key.identity = identity >= IDENTITY_FIRST && (flags & POLICY_ALIKE) ? IDENTITY_MESH : identity;
	key.port = port;
	/* A probe is one wherever the node's address is. */
	if ((flags & POLICY_CLASSES) && identity != IDENTITY_PROBE)
		key.address_class = class_of(netns, *generation, source);
	verdict = map_lookup(policy, &key);
	if (!verdict) {
		key.port = 0;
		verdict = map_lookup(policy, &key);
	}
	return verdict && *verdict ? 0 : REASON_POLICY;
}

/*
 * Whether NetworkPolicy lets the pod speak, in this direction, with that other end. The port is the destination's. From the verdict
 * of this moment: an inner map is swapped whole.
 */
inline_always bool network_allows(u64 netns, u32 direction, const struct address *other, u8 protocol,
				  __be16 port)
{
	struct network_of of = { .netns = netns, .direction = direction };
	void *network = map_lookup(MAP(NETWORKS), &of);
	struct network_key key = {
		.prefix_length = NETWORK_PREFIX_BITS + ADDRESS_BITS,
		.value = *other,
	};
	u32 *found;

	if (!network)
		return true;
	found = map_lookup(network, &key);
	key.stage = (found ? *found : 0) + 1;
	key.prefix_length = NETWORK_PREFIX_BITS + NETWORK_PORT_BITS;
	key.value.word[0] = NETWORK_PORT(protocol, bpf_ntohs(port));
	found = map_lookup(network, &key);
	return found && *found;
}

/*
 * All of it, for a TCP connection that came, or comes, in a certain way: only some are asked about. A probe is one on the ports
 * that the pod's probes name, and plain text elsewhere; what the node proxy delivers was judged there.
 */
inline_always u32 judge_via(u32 kind, u64 netns, u32 identity, const struct address *source, __be16 port,
			    u32 *generation)
{
	u32 reason;

	*generation = 0;
	if (kind == VIA_TUNNEL || kind == VIA_SELF)
		return 0;
	reason = judge(netns, identity, source, port, generation);
	if (kind == VIA_PROBE) {
		/* NetworkPolicy never keeps a node from its own pods. */
		return reason == REASON_POLICY ? judge(netns, IDENTITY_PLAIN, source, port, generation) :
						 reason;
	}
	if (!reason && !network_allows(netns, DIRECTION_INBOUND, source, IPPROTO_TCP, port))
		reason = REASON_NETWORK_POLICY;
	return reason;
}

#endif
