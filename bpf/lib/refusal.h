/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What was refused: counted by reason and by who, and told to user space. */
#ifndef MYCEL_REFUSAL_H
#define MYCEL_REFUSAL_H

#include "lib/helpers.h"
#include "lib/record.h"

#define SECOND_NS 1000000000ULL
/* A client sends its SYN again for about two minutes; told once in that time. */
#define ATTEMPT_NS (130 * SECOND_NS)
/* How long after its end a connection's stragglers (data, FIN, RST) are known as such. */
#define STRAGGLER_NS (10 * SECOND_NS)
/* An application that dials again and again is told of once in a while. */
#define DIAL_NS (5 * SECOND_NS)

/* The others together have one account for what finds no room. */
inline_always bool is_counted_apart(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

inline_always void count_refused(struct flow_key *flow, u64 number, u64 bytes)
{
	struct refusals *refusals = map_lookup(MAP(REFUSED), flow);
	struct refusals none = {};

	if (!refusals) {
		map_update(MAP(REFUSED), flow, &none, BPF_NOEXIST);
		refusals = map_lookup(MAP(REFUSED), flow);
	}
	if (!refusals) {
		/* Somebody scans ports: the rest is counted under port 0, which the loader put there. */
		count(COUNTER_FULL_REFUSED);
		struct flow_key other = {
			.verdict = VERDICT_SEVERAL,
			.protocol = is_counted_apart(flow->protocol) ? flow->protocol : 0,
			.direction = flow->direction,
		};

		refusals = map_lookup(MAP(REFUSED), &other);
	}
	if (!refusals)
		return;
	__sync_fetch_and_add(&refusals->count, number);
	if (bytes)
		__sync_fetch_and_add(&refusals->bytes, bytes);
}

/* In the ring buffer at once: the stack is small, and callers have much on it. */
inline_always void tell(u64 netns, const struct tuple *tuple, u32 reason, u32 source, u32 destination)
{
	struct event *event = ringbuf_reserve(MAP(EVENTS), sizeof(*event), 0);

	if (!event) {
		count(COUNTER_FULL_EVENTS);
		return;
	}
	event->netns = netns;
	event->reason = reason;
	event->source = source;
	event->destination = destination;
	event->client_address = tuple->client_address;
	event->server_address = tuple->server_address;
	event->client_port = tuple->client_port;
	event->server_port = tuple->server_port;
	ringbuf_submit(event, 0);
}

/* Whether it was told within the period already; if not, it is from now on. */
inline_always bool was_told(struct refusal *refusal, u64 period)
{
	u64 *told = map_lookup(MAP(RECENT), refusal);
	/* Before the clock, as another processor may tell at this moment. */
	u64 before = told ? *(volatile u64 *)told : 0;
	u64 now = now_ns();

	if (told && now - before < period)
		return true;
	map_update(MAP(RECENT), refusal, &now, BPF_ANY);
	return false;
}

/* Refused at connect(): each attempt is counted. The client is the pod's address; it has no port yet. */
inline_always void refuse_first(u64 netns, const struct address *client, u32 reason, u32 source,
				u32 destination, const struct address *address, __be16 port, u8 protocol,
				u32 direction)
{
	struct flow_key flow = {
		.source = source,
		.destination = destination,
		.source_zone = zone_of(client),
		.destination_zone = zone_of(address),
		.port = port,
		.verdict = reason,
		.protocol = protocol,
		.direction = direction,
	};
	struct refusal refusal = {
		.tuple = { .client_address = *client, .server_address = *address, .server_port = port },
		.reason = reason,
	};

	count(reason);
	count_refused(&flow, 1, 0);
	record_refused(netns, &refusal.tuple, &flow);
	if (!was_told(&refusal, DIAL_NS))
		tell(netns, &refusal.tuple, reason, source, destination);
}

inline_always void refuse_dial(u64 netns, const struct address *client, u32 reason, u32 source,
			       u32 destination, const struct address *address, __be16 port, u32 direction)
{
	refuse_first(netns, client, reason, source, destination, address, port, IPPROTO_TCP, direction);
}

inline_always u64 mixed(u64 hash, u32 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 29;
}

/* The same of either end of a connection. */
inline_always u64 fingerprint_of(const struct tuple *tuple)
{
	u64 client = tuple->client_port, server = tuple->server_port;

	for (int i = 0; i < 4; i++) {
		client = mixed(client, tuple->client_address.word[i]);
		server = mixed(server, tuple->server_address.word[i]);
	}
	return mixed(client + server, (u32)(client ^ server));
}

inline_always struct closed *closed_at(u64 fingerprint)
{
	u32 slot = (u32)(fingerprint >> 32) & (CLOSED_SLOTS - 1);

	return map_lookup(MAP(CLOSED), &slot);
}

/* A connection has ended: what still comes of it belongs to no socket, and is no attempt to connect. */
inline_always void note_closed(struct tuple *tuple)
{
	u64 fingerprint = fingerprint_of(tuple);
	struct closed *closed = closed_at(fingerprint);

	if (!closed)
		return;
	closed->when = now_ns();
	closed->fingerprint = fingerprint;
}

/* Either end may be the one that lingers. */
inline_always bool is_straggler(struct tuple *tuple)
{
	u64 fingerprint = fingerprint_of(tuple);
	struct closed *closed = closed_at(fingerprint);

	if (!closed || *(volatile u64 *)&closed->fingerprint != fingerprint)
		return false;
	u64 before = *(volatile u64 *)&closed->when;

	return now_ns() - before < STRAGGLER_NS;
}

/* Refused on arrival: counted and told once for all SYNs of one attempt. */
inline_always void refuse_arrival(struct tuple *tuple, u32 reason, u32 source, u32 destination)
{
	struct refusal refusal = { .tuple = *tuple, .reason = reason };

	if (is_straggler(tuple))
		return;
	if (was_told(&refusal, ATTEMPT_NS))
		return;

	struct flow_key flow = {
		.source = source,
		.destination = destination,
		.source_zone = zone_of(&tuple->client_address),
		.destination_zone = zone_of(&tuple->server_address),
		.port = tuple->server_port,
		.verdict = reason,
		.protocol = IPPROTO_TCP,
		.direction = DIRECTION_INBOUND,
	};

	count(reason);
	count_refused(&flow, 1, 0);
	record_refused(0, tuple, &flow);
	tell(0, tuple, reason, source, destination);
}

#endif
