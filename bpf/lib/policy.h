/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The verdict on a connection to a pod of this node, from the table that the agent compiled. */
#ifndef MYCEL_POLICY_H
#define MYCEL_POLICY_H

#include "lib/helpers.h"

/* 0 when allowed, else the reason. The generation is that of the table that was asked. */
inline_always u32 judge(u64 netns, u32 identity, __be16 port, u32 *generation)
{
	struct policy_key key = { .identity = identity, .port = port };
	struct policy_key generation_key = { .identity = POLICY_GENERATION };
	void *policy = map_lookup(MAP(POLICIES), &netns);
	u32 *verdict;

	*generation = 0;
	if (!policy)
		return REASON_NO_POLICY;
	verdict = map_lookup(policy, &generation_key);
	if (verdict)
		*generation = *verdict;
	verdict = map_lookup(policy, &key);
	if (!verdict) {
		key.port = 0;
		verdict = map_lookup(policy, &key);
	}
	return verdict && *verdict ? 0 : REASON_POLICY;
}

/* The same for what came, or comes, in a certain way: only some are asked about at all. */
inline_always u32 judge_via(u32 kind, u64 netns, u32 identity, __be16 port, u32 *generation)
{
	*generation = 0;
	if (kind == VIA_PROBE || kind == VIA_TUNNEL || kind == VIA_SELF)
		return 0;
	return judge(netns, identity, port, generation);
}

#endif
