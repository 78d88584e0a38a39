/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Accounts: exact bytes, for connections that are open as for those that have closed.
 *
 * What an application wrote and read by TCP follows from the socket's own sequence numbers at any time, so nothing is done per
 * packet. A socket's storage says how much of that is in its flow already. Two may bring a flow up to date at once, the
 * iterator (when somebody asks) and the socket's end: whoever exchanges the stored number adds the difference, so that the
 * sum is right in any order, and the end leaves ACCOUNT_CLOSED behind, so that nobody comes after it.
 *
 * UDP is counted datagram by datagram where it is judged, on the host's side of the pod's veth.
 */
#ifndef MYCEL_ACCOUNT_H
#define MYCEL_ACCOUNT_H

#include "lib/helpers.h"
#include "lib/record.h"
#include "lib/refusal.h"
#include "lib/splice.h"

#define STATES_WITH_FIN_SENT                                                            \
	((1 << BPF_TCP_FIN_WAIT1) | (1 << BPF_TCP_FIN_WAIT2) | (1 << BPF_TCP_CLOSING) | \
	 (1 << BPF_TCP_LAST_ACK) | (1 << BPF_TCP_TIME_WAIT))
/* tcp_sock.urg_data, when the application has taken the urgent byte by MSG_OOB. */
#define TCP_URG_READ 0x0400
/* Of one socket, at one moment, of which one is first at each attempt. */
#define LATE_READERS 8

/* A walk does not lock the socket: what it takes off may be newer than what it takes it off from. */
inline_always u64 at_least_none(u64 bytes)
{
	return (s64)bytes < 0 ? 0 : bytes;
}

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
	return at_least_none(written);
}

/*
 * Bytes that the application read. bytes_received counts the peer's FIN, and copied_seq goes past it when the
 * application has read the end of the stream (nothing can come after it, so copied_seq == rcv_nxt says so).
 * An urgent byte is read when MSG_OOB took it, or else when the stream was read beyond it.
 */
inline_always u64 bytes_read(void *tcp)
{
	u64 received = LOAD(u64, tcp, TCP_SOCK_BYTES_RECEIVED);
	u32 copied = LOAD(u32, tcp, TCP_SOCK_COPIED_SEQ);
	u32 waiting = LOAD(u32, tcp, TCP_SOCK_RCV_NXT) - copied;

	received -= waiting;
	if (waiting == 0 && (LOAD(u64, tcp, SOCK_FLAGS) & (1ULL << SOCK_DONE)))
		received--;
	if (LOAD(u16, tcp, TCP_SOCK_URG_DATA) == TCP_URG_READ &&
	    (s32)(LOAD(u32, tcp, TCP_SOCK_URG_SEQ) - copied) >= 0)
		received++;
	return at_least_none(received);
}

/* In microseconds; 0 while nothing was measured. The kernel keeps eight times it. */
inline_always u32 smoothed_rtt(void *tcp)
{
	return LOAD(u32, tcp, TCP_SOCK_SRTT_US) >> 3;
}

inline_always void add_rtt(struct flow *flow, u32 rtt_us)
{
	if (!rtt_us)
		return;
	__sync_fetch_and_add(&flow->rtt_us, rtt_us);
	__sync_fetch_and_add(&flow->rtt_samples, 1);
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
	struct flow_key other = { .protocol = key->protocol, .direction = key->direction };

	return map_lookup(MAP(FLOWS), &other);
}

inline_always void account_open(struct socket_state *state)
{
	struct flow *flow = flow_of(&state->flow);

	if (flow)
		__sync_fetch_and_add(&flow->opened, 1);
	state->opened = now_ns();
	state->flags |= SOCKET_OPEN;
}

/* What was counted as read. */
inline_always u64 account_close(struct socket_state *state, void *sk, void *tcp, u32 old_state)
{
	u64 sent = bytes_written(tcp, old_state, state->flags & SOCKET_ACTIVE);
	u64 received = bytes_read(tcp);
	u64 retransmits = LOAD(u32, tcp, TCP_SOCK_TOTAL_RETRANS);
	u32 rtt_us = smoothed_rtt(tcp);

	spliced_bytes(sk, &sent, &received);
	u64 sent_before = __sync_lock_test_and_set(&state->sent, ACCOUNT_CLOSED);
	u64 received_before = __sync_lock_test_and_set(&state->received, ACCOUNT_CLOSED);
	u64 retransmits_before = __sync_lock_test_and_set(&state->retransmits, ACCOUNT_CLOSED);
	struct flow *flow = flow_of(&state->flow);

	if (flow) {
		__sync_fetch_and_add(&flow->sent, sent - sent_before);
		__sync_fetch_and_add(&flow->received, received - received_before);
		__sync_fetch_and_add(&flow->retransmits, retransmits - retransmits_before);
		add_rtt(flow, rtt_us);
		__sync_fetch_and_add(&flow->closed, 1);
	}
	struct flow_record *record = new_record();

	if (!record)
		return received;
	record->netns = state->netns;
	record->started = state->opened;
	record->ended = now_ns();
	record->sent = sent;
	record->received = received;
	record->sent_datagrams = 0;
	record->received_datagrams = 0;
	record->tuple = state->tuple;
	record->flow = state->flow;
	record->rtt_us = rtt_us;
	record->retransmits = retransmits;
	record->kind = state->kind;
	record->pad = 0;
	submit_record(record);
	return received;
}

/*
 * An application may read what its socket still has when the connection is closed: it is counted then. read is all that recv gave;
 * of two readers the one with more adds for both, or what the other has left.
 */
inline_always void account_late_read(struct splice_end *end, u64 read)
{
	struct flow_key key = end->flow;

	for (int i = 0; i < LATE_READERS; i++) {
		u64 before = *(volatile u64 *)&end->accounted;
		struct flow *flow;

		if (read <= before)
			return;
		if (__sync_val_compare_and_swap(&end->accounted, before, read) != before)
			continue;
		flow = flow_of(&key);
		if (flow)
			__sync_fetch_and_add(&flow->received, read - before);
		return;
	}
}

/*
 * A UDP datagram that passes between a pod and its veth, or several of one sender (segmentation offload). Bytes are payload;
 * of a fragmented datagram the first fragment stands for all. flow is whose it is if it begins a conversation.
 */
inline_always void account_datagram(struct conversation_key *key, struct flow_key *begins, bool from_pod,
				    u32 bytes, u32 datagrams)
{
	struct conversation *conversation = map_lookup(MAP(CONVERSATIONS), key);
	struct flow_key other = { .protocol = begins->protocol, .direction = begins->direction };
	struct flow *flow;
	u64 now = now_ns();
	bool opens = false;

	if (!conversation) {
		struct conversation fresh = { .opened = now, .last = now, .flow = *begins };

		opens = map_update(MAP(CONVERSATIONS), key, &fresh, BPF_NOEXIST) == 0;
		conversation = map_lookup(MAP(CONVERSATIONS), key);
	}
	if (conversation) {
		conversation->last = now;
		__sync_fetch_and_add(from_pod ? &conversation->sent : &conversation->received, bytes);
		__sync_fetch_and_add(from_pod ? &conversation->sent_datagrams :
						&conversation->received_datagrams,
				     datagrams);
		flow = flow_of(&conversation->flow);
	} else {
		/* Full: who began is not to be known, so it is nobody's. */
		count(COUNTER_FULL_CONVERSATIONS);
		flow = map_lookup(MAP(FLOWS), &other);
	}
	if (!flow)
		return;
	if (opens)
		__sync_fetch_and_add(&flow->opened, 1);
	__sync_fetch_and_add(from_pod ? &flow->sent : &flow->received, bytes);
	__sync_fetch_and_add(from_pod ? &flow->sent_datagrams : &flow->received_datagrams, datagrams);
}

/* One that was dropped: each is counted, a record is written once in a while. flow has the verdict. */
inline_always void account_refused_datagram(struct conversation_key *key, struct flow_key *flow, u32 bytes,
					    u32 datagrams)
{
	struct refusal refusal = { .reason = flow->verdict };
	bool outbound = flow->direction == DIRECTION_OUTBOUND;

	refusal.tuple.client_address = outbound ? key->pod_address : key->peer_address;
	refusal.tuple.server_address = outbound ? key->peer_address : key->pod_address;
	refusal.tuple.client_port = outbound ? key->pod_port : key->peer_port;
	refusal.tuple.server_port = outbound ? key->peer_port : key->pod_port;
	count_refused(flow, datagrams, bytes);
	if (!was_told(&refusal, DIAL_NS)) {
		record_refused(key->netns, &refusal.tuple, flow);
		tell(key->netns, &refusal.tuple, flow->verdict, flow->source, flow->destination);
	}
}

#endif
