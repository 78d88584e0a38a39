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
	u32 flags = state->flags;

	if ((flags & (SOCKET_OPEN | SOCKET_COUNTED)) != (SOCKET_OPEN | SOCKET_COUNTED))
		return 0;
	void *tcp = to_tcp_sock(sk);

	if (!tcp)
		return 0;
	u64 sent = bytes_written(tcp, LOAD(u8, tcp, SOCK_STATE), flags & SOCKET_ACTIVE);
	u64 received = bytes_read(tcp);
	struct flow_key key = state->flow;
	struct flow *flow = flow_of(&key);

	if (!flow)
		return 0;
	bring_up(&state->sent, sent, sent_before, &flow->sent);
	bring_up(&state->received, received, received_before, &flow->received);
	return 0;
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

	if (!(flags & SOCKET_OPEN) || (flags & SOCKET_ACTIVE) || state->sent == ACCOUNT_CLOSED)
		return 0;
	row.netns = state->netns;
	row.cookie = state->cookie;
	row.tuple = state->tuple;
	row.source = state->identity;
	row.destination = state->flow.destination;
	row.generation = state->generation;
	row.kind = state->kind;
	row.flags = flags & SOCKET_REVOKED;
	if (refused_only) {
		struct pod *pod = map_lookup(MAP(PODS), &row.netns);

		/* One that has left, or is leaving, keeps what it has. */
		if (!pod || (pod->flags & POD_OPEN))
			return 0;
		if (!judge_via(row.kind, row.netns, row.source, row.tuple.server_port, &generation))
			return 0;
	}
	void *tcp = to_tcp_sock(sk);

	if (!tcp)
		return 0;
	row.sent = bytes_written(tcp, LOAD(u8, tcp, SOCK_STATE), false);
	row.received = bytes_read(tcp);
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
