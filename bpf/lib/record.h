/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Flow records: one for each counted end of a connection or conversation that has ended, and for what was refused. They go
 * through a ring buffer of their own; what finds no room there is counted, and is in the sums all the same.
 */
#ifndef MYCEL_RECORD_H
#define MYCEL_RECORD_H

#include "lib/helpers.h"

inline_always void count(u32 counter)
{
	u64 *value = map_lookup(MAP(COUNTERS), &counter);

	if (value)
		__sync_fetch_and_add(value, 1);
}

/* Room for a record, to be submitted; 0 (and counted) when there is none. The reader looks by itself, nobody is woken. */
inline_always struct flow_record *new_record(void)
{
	struct flow_record *record = ringbuf_reserve(MAP(RECORDS), sizeof(*record), 0);

	if (!record)
		count(COUNTER_FULL_RECORDS);
	return record;
}

inline_always void submit_record(struct flow_record *record)
{
	ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

inline_always void record_refused(u64 netns, struct tuple *tuple, struct flow_key *flow)
{
	struct flow_record *record = new_record();

	if (!record)
		return;
	__builtin_memset(record, 0, sizeof(*record));
	record->netns = netns;
	record->started = now_ns();
	record->ended = record->started;
	record->tuple = *tuple;
	record->flow = *flow;
	submit_record(record);
}

/* The zone of an address' workload; 0 when it is not known. */
inline_always u16 zone_of(const struct address *address)
{
	struct peer *peer = map_lookup(MAP(PEERS), address);

	return peer ? peer->zone : 0;
}

#endif
