/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Loaded only when a map gets another size (bpf/resize.py), and run once over the map that it takes the place of: what cannot
 * be carried over from user space. Sockets are no value, and sums go on while they are carried.
 */
#include "lib/helpers.h"

/* struct bpf_iter__sockmap and struct bpf_iter__bpf_map_elem of the kernel. */
#define CARRY_KEY 16
#define CARRY_VALUE 24

#ifdef MAP_LISTENERS_BEFORE
int bpf_iter__sockmap__listeners(void *ctx)
{
	struct endpoint *found = LOAD_POINTER(ctx, CARRY_KEY);
	void *sk = LOAD_POINTER(ctx, CARRY_VALUE);

	if (!found || !sk)
		return 0;
	struct endpoint key = *found;

	map_update(MAP(LISTENERS), &key, sk, BPF_ANY);
	return 0;
}
#endif

/* Adds what a map had to what the one in its place has by now; all values are sums of 64 bits. */
#define SUM(NAME, value_type)                                                                             \
	void *found = LOAD_POINTER(ctx, CARRY_KEY);                                                       \
	u64 *before = LOAD_POINTER(ctx, CARRY_VALUE);                                                     \
	value_type nothing = { 0 };                                                                       \
                                                                                                          \
	if (!found || !before)                                                                            \
		return 0;                                                                                 \
	struct flow_key key = *(struct flow_key *)found;                                                  \
	u64 *sums = map_lookup(MAP(NAME), &key);                                                          \
                                                                                                          \
	if (!sums) {                                                                                      \
		if (map_update(MAP(NAME), &key, &nothing, BPF_NOEXIST) == -7 /* E2BIG */) {               \
			struct flow_key other = { .protocol = key.protocol, .direction = key.direction }; \
                                                                                                          \
			key = other;                                                                      \
		}                                                                                         \
		sums = map_lookup(MAP(NAME), &key);                                                       \
	}                                                                                                 \
	if (!sums)                                                                                        \
		return 0;                                                                                 \
	_Pragma("unroll") for (int word = 0; word < sizeof(value_type) / sizeof(u64); word++)             \
		__sync_fetch_and_add(&sums[word], before[word]);                                          \
	return 0

#ifdef MAP_FLOWS_BEFORE
int bpf_iter__bpf_map_elem__flows(void *ctx)
{
	SUM(FLOWS, struct flow);
}
#endif

#ifdef MAP_REFUSED_BEFORE
int bpf_iter__bpf_map_elem__refused(void *ctx)
{
	SUM(REFUSED, struct refusals);
}
#endif
