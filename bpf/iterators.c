/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Walks over all sockets that we keep something of, in every namespace; pinned, and run by reading the pin.
 * No socket is locked: see lib/account.h for why the accounts are exact all the same. A socket may even end while we look
 * at it, and its memory be another socket's; its storage stays until the walk is over, and has said ACCOUNT_CLOSED before.
 */
#include "lib/account.h"
#include "lib/helpers.h"
#include "lib/policy.h"

/* struct bpf_iter__bpf_sk_storage_map of the kernel: four pointers. */
#define ITERATOR_META 0
#define ITERATOR_SOCKET 16
#define ITERATOR_VALUE 24

/* What is in the flow already is brought up to what the socket says; whoever was faster has done it. */
inline_always void bring_up(u64 *stored, u64 now, u64 before, u64 *total)
{
	if (before == ACCOUNT_CLOSED || now <= before)
		return;
	if (__sync_val_compare_and_swap(stored, before, now) == before)
		__sync_fetch_and_add(total, now - before);
}

int bpf_iter__bpf_sk_storage_map__accounts(void *ctx)
{
	void *sk = LOAD_POINTER(ctx, ITERATOR_SOCKET);
	struct socket_state *state = LOAD_POINTER(ctx, ITERATOR_VALUE);

	if (!sk || !state)
		return 0;
	u64 sent_before = *(volatile u64 *)&state->sent;
	u64 received_before = *(volatile u64 *)&state->received;
	u64 retransmits_before = *(volatile u64 *)&state->retransmits;
	u32 flags = state->flags;

	if ((flags & (SOCKET_OPEN | SOCKET_COUNTED)) != (SOCKET_OPEN | SOCKET_COUNTED))
		return 0;
	void *tcp = to_tcp_sock(sk);

	if (!tcp)
		return 0;
	u64 sent = bytes_written(tcp, LOAD(u8, tcp, SOCK_STATE), flags & SOCKET_ACTIVE);
	u64 received = bytes_read(tcp);
	u64 retransmits = LOAD(u32, tcp, TCP_SOCK_TOTAL_RETRANS);

	spliced_bytes(sk, &sent, &received);
	struct flow_key key = state->flow;
	struct flow *flow = flow_of(&key);

	if (!flow)
		return 0;
	bring_up(&state->sent, sent, sent_before, &flow->sent);
	bring_up(&state->received, received, received_before, &flow->received);
	bring_up(&state->retransmits, retransmits, retransmits_before, &flow->retransmits);
	add_rtt(flow, smoothed_rtt(tcp));
	return 0;
}

/* Whether NetworkPolicy would let this end dial now, as connect() asked it. */
inline_always bool may_go_on(struct socket_state *state)
{
	u32 kind = state->kind;
	struct address destination = state->destination_address;

	/* Of a request for l7proxy the endpoint is not known yet, and its own dial is judged. */
	if (kind == VIA_SELF || kind == VIA_TUNNEL || kind == VIA_PROBE ||
	    (kind == VIA_CAPTURED && state->tuple.server_port == bpf_htons(PORT_OUTBOUND_L7)))
		return true;
	return network_allows(state->netns, DIRECTION_OUTBOUND, &destination, IPPROTO_TCP,
			      state->destination_port);
}

inline_always int write_connection(void *ctx, bool refused_only)
{
	void *sk = LOAD_POINTER(ctx, ITERATOR_SOCKET);
	struct socket_state *state = LOAD_POINTER(ctx, ITERATOR_VALUE);
	void *meta = LOAD_POINTER(ctx, ITERATOR_META);
	struct connection row = {};
	u32 generation;

	if (!sk || !state)
		return 0;
	u32 flags = state->flags;

	if (!(flags & SOCKET_OPEN) || state->sent == ACCOUNT_CLOSED)
		return 0;
	if ((flags & SOCKET_ACTIVE) && !refused_only)
		return 0;
	row.netns = state->netns;
	row.cookie = state->cookie;
	row.tuple = state->tuple;
	row.source = state->identity;
	row.destination = state->flow.destination;
	row.generation = state->generation;
	row.kind = state->kind;
	row.flags = flags & (SOCKET_REVOKED | SOCKET_ACTIVE);
	if (refused_only) {
		struct pod *pod = map_lookup(MAP(PODS), &row.netns);

		/* One that has left, or is leaving, keeps what it has. */
		if (!pod || (pod->flags & POD_OPEN))
			return 0;
		if (!(flags & SOCKET_ACTIVE) ?
			    !judge_via(row.kind, row.netns, row.source, &row.tuple.client_address,
				       row.tuple.server_port, &generation) :
			    may_go_on(state))
			return 0;
	}
	void *tcp = to_tcp_sock(sk);

	if (!tcp)
		return 0;
	row.sent = bytes_written(tcp, LOAD(u8, tcp, SOCK_STATE), flags & SOCKET_ACTIVE);
	row.received = bytes_read(tcp);
	row.rtt_us = smoothed_rtt(tcp);
	row.retransmits = LOAD(u32, tcp, TCP_SOCK_TOTAL_RETRANS);
	spliced_bytes(sk, &row.sent, &row.received);
	void *seq = LOAD_POINTER(meta, 0);

	/* When the reader's buffer is full the kernel comes back to this one. */
	seq_write(seq, &row, sizeof(row));
	return 0;
}

int bpf_iter__bpf_sk_storage_map__connections(void *ctx)
{
	return write_connection(ctx, false);
}

int bpf_iter__bpf_sk_storage_map__refused(void *ctx)
{
	return write_connection(ctx, true);
}

/* struct bpf_iter__bpf_map_elem of the kernel: four pointers. */
#define ELEMENT_KEY 16
#define ELEMENT_VALUE 24

/* Ends the conversations that have fallen silent. Whoever deletes one counts its end. */
int bpf_iter__bpf_map_elem__silent(void *ctx)
{
	struct conversation_key *at = LOAD_POINTER(ctx, ELEMENT_KEY);
	struct conversation *conversation = LOAD_POINTER(ctx, ELEMENT_VALUE);

	if (!at || !conversation)
		return 0;
	u64 last = *(volatile u64 *)&conversation->last;

	if (now_ns() - last < CONVERSATION_IDLE_NS)
		return 0;
	struct conversation_key key = *at;
	struct conversation ended = *conversation;

	if (map_delete(MAP(CONVERSATIONS), &key))
		return 0;
	struct flow *flow = flow_of(&ended.flow);

	if (flow)
		__sync_fetch_and_add(&flow->closed, 1);
	struct flow_record *record = new_record();

	if (!record)
		return 0;
	bool outbound = ended.flow.direction == DIRECTION_OUTBOUND;

	__builtin_memset(record, 0, sizeof(*record));
	record->netns = key.netns;
	record->started = ended.opened;
	record->ended = ended.last;
	record->sent = ended.sent;
	record->received = ended.received;
	record->sent_datagrams = ended.sent_datagrams;
	record->received_datagrams = ended.received_datagrams;
	record->tuple.client_address = outbound ? key.pod_address : key.peer_address;
	record->tuple.server_address = outbound ? key.peer_address : key.pod_address;
	record->tuple.client_port = outbound ? key.pod_port : key.peer_port;
	record->tuple.server_port = outbound ? key.peer_port : key.pod_port;
	record->flow = ended.flow;
	submit_record(record);
	return 0;
}
