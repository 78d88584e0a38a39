/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Accounts: exact bytes, for connections that are open as for those that have closed.
 *
 * What an application wrote and read follows from the socket's own sequence numbers at any time, so nothing is done per
 * packet. A socket's storage says how much of that is in its flow already. Two may bring a flow up to date at once, the
 * iterator (when somebody asks) and the socket's end: whoever exchanges the stored number adds the difference, so that the
 * sum is right in any order, and the end leaves ACCOUNT_CLOSED behind, so that nobody comes after it.
 */
#ifndef MYCEL_ACCOUNT_H
#define MYCEL_ACCOUNT_H

#include "lib/helpers.h"
#include "lib/refusal.h"

#define STATES_WITH_FIN_SENT                                                            \
	((1 << BPF_TCP_FIN_WAIT1) | (1 << BPF_TCP_FIN_WAIT2) | (1 << BPF_TCP_CLOSING) | \
	 (1 << BPF_TCP_LAST_ACK) | (1 << BPF_TCP_TIME_WAIT))

/*
 * Bytes that the application wrote. bytes_acked is 64 bits wide and counts our SYN (when we dialled) and FIN, as
 * write_seq does; what is beyond snd_una is written and not yet acknowledged.
 */
inline_always u64 bytes_written(void *tcp, u32 state, bool active)
{
	u64 written = LOAD(u64, tcp, TCP_SOCK_BYTES_ACKED);

	written += (u32)(LOAD(u32, tcp, TCP_SOCK_WRITE_SEQ) - LOAD(u32, tcp, TCP_SOCK_SND_UNA));
	if (active)
		written--;
	if (STATES_WITH_FIN_SENT & (1 << (state & 15)))
		written--;
	return written;
}

/*
 * Bytes that the application read. bytes_received counts the peer's FIN, and copied_seq goes past it when the
 * application has read the end of the stream (nothing can come after it, so copied_seq == rcv_nxt says so).
 */
inline_always u64 bytes_read(void *tcp)
{
	u64 received = LOAD(u64, tcp, TCP_SOCK_BYTES_RECEIVED);
	u32 waiting = LOAD(u32, tcp, TCP_SOCK_RCV_NXT) - LOAD(u32, tcp, TCP_SOCK_COPIED_SEQ);

	received -= waiting;
	if (waiting == 0 && (LOAD(u64, tcp, SOCK_FLAGS) & (1ULL << SOCK_DONE)))
		received--;
	return received;
}

inline_always struct flow *flow_of(struct flow_key *key)
{
	struct flow *flow = map_lookup(MAP(FLOWS), key);
	struct flow empty = {};

	if (flow)
		return flow;
	map_update(MAP(FLOWS), key, &empty, BPF_NOEXIST);
	flow = map_lookup(MAP(FLOWS), key);
	if (flow)
		return flow;
	/* Full: the loader put one there for the rest. */
	count(COUNTER_FULL_FLOWS);
	struct flow_key other = { .direction = key->direction };

	return map_lookup(MAP(FLOWS), &other);
}

inline_always void account_open(struct socket_state *state)
{
	struct flow *flow = flow_of(&state->flow);

	if (flow)
		__sync_fetch_and_add(&flow->opened, 1);
	state->flags |= SOCKET_OPEN;
}

inline_always void account_close(struct socket_state *state, void *tcp, u32 old_state)
{
	u64 sent = bytes_written(tcp, old_state, state->flags & SOCKET_ACTIVE);
	u64 received = bytes_read(tcp);
	u64 sent_before = __sync_lock_test_and_set(&state->sent, ACCOUNT_CLOSED);
	u64 received_before = __sync_lock_test_and_set(&state->received, ACCOUNT_CLOSED);
	struct flow *flow = flow_of(&state->flow);

	if (!flow)
		return;
	__sync_fetch_and_add(&flow->sent, sent - sent_before);
	__sync_fetch_and_add(&flow->received, received - received_before);
	__sync_fetch_and_add(&flow->closed, 1);
}

#endif
