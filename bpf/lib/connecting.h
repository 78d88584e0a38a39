/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Who writes into connecting and captured, and how much of them one pod may have: a pod that dials without end fills its own
 * share, and the others go on. What is over the share is refused as by a full map. Namespaces that are no pod's have no share.
 *
 * MAP_CONNECTING_BEFORE and MAP_CAPTURED_BEFORE are the maps that ones of another size take the place of: until the next load
 * everything is written into both, so that no reader, the older program or a proxy with its descriptor, misses any.
 */
#ifndef MYCEL_CONNECTING_H
#define MYCEL_CONNECTING_H

#include "lib/helpers.h"
#include "lib/refusal.h"

inline_always struct share *share_of(u64 netns)
{
	return map_lookup(MAP(SHARES), &netns);
}

/* Whether it is written down; if not, that is counted. */
inline_always bool put_connecting(struct tuple *tuple, struct who *who)
{
	struct share *share = share_of(who->netns);
	long error;

	if (share && share->connecting >= SHARE_CONNECTING) {
		count(COUNTER_SHARE_CONNECTING);
		return false;
	}
#ifdef MAP_CONNECTING_BEFORE
	map_update(MAP(CONNECTING_BEFORE), tuple, who, BPF_ANY);
#endif
	error = map_update(MAP(CONNECTING), tuple, who, BPF_NOEXIST);
	if (error == -EEXIST) {
		map_update(MAP(CONNECTING), tuple, who, BPF_ANY);
		return true;
	}
	if (error < 0) {
		count(COUNTER_FULL_CONNECTING);
		return false;
	}
	if (share)
		__sync_fetch_and_add(&share->connecting, 1);
	return true;
}

/* netns: of the socket that dialled. */
inline_always void drop_connecting(u64 netns, struct tuple *tuple)
{
	struct share *share;

#ifdef MAP_CONNECTING_BEFORE
	map_delete(MAP(CONNECTING_BEFORE), tuple);
#endif
	if (map_delete(MAP(CONNECTING), tuple) < 0)
		return;
	share = share_of(netns);
	if (share)
		__sync_fetch_and_add(&share->connecting, -1);
}

inline_always bool put_captured(struct captured_key *key, struct captured *value)
{
	struct share *share = share_of(key->netns);
	long error;

	if (share && share->captured >= SHARE_CAPTURED) {
		count(COUNTER_SHARE_CAPTURED);
		return false;
	}
#ifdef MAP_CAPTURED_BEFORE
	map_update(MAP(CAPTURED_BEFORE), key, value, BPF_ANY);
#endif
	error = map_update(MAP(CAPTURED), key, value, BPF_NOEXIST);
	if (error == -EEXIST) {
		map_update(MAP(CAPTURED), key, value, BPF_ANY);
		return true;
	}
	if (error < 0) {
		count(COUNTER_FULL_CAPTURED);
		return false;
	}
	if (share)
		__sync_fetch_and_add(&share->captured, 1);
	return true;
}

inline_always void drop_captured(struct captured_key *key)
{
	struct share *share;

#ifdef MAP_CAPTURED_BEFORE
	map_delete(MAP(CAPTURED_BEFORE), key);
#endif
	if (map_delete(MAP(CAPTURED), key) < 0)
		return;
	share = share_of(key->netns);
	if (share)
		__sync_fetch_and_add(&share->captured, -1);
}

#endif
