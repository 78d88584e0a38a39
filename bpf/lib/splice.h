/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The splice: what one application of this node sends to another goes from socket to socket, past TCP, where no byte can be lost
 * or overtaken by it. The rules, and where each is kept:
 *
 * - A connection enters late: both ends have read a few times, each with plain recv on a non-blocking socket (splice.c,
 *   sock_recv_length), and are proven to be each other's ends (their sequence numbers begin where the other's do).
 * - A message is redirected only when all that was sent before it has been read, or was redirected too: the reader takes redirected
 *   bytes first, so that they would overtake what TCP still carries.
 * - At most SPLICE_CAP bytes are outstanding. More makes both directions pass by TCP for ever, which stops the writer.
 * - Bytes are counted before the reader can see them, and SPLICE_LEAVING is looked at after they were counted. Whoever has set it
 *   and then finds as much read as was redirected knows that the queue is empty, and that nothing will come into it.
 * - Only such a socket leaves splice_sockets: the kernel throws away what is left in the queue of one that does.
 *
 * "out" is never too small, so nothing is redirected too early: what was read is published after it was read. The queue is never
 * taken for empty too early: see is_drained().
 */
#ifndef MYCEL_SPLICE_H
#define MYCEL_SPLICE_H

#include "lib/helpers.h"

static long (*msg_redirect_hash)(void *ctx, void *map, void *key,
				 u64 flags) = (void *)BPF_FUNC_msg_redirect_hash;
static long (*tail_call)(void *ctx, void *map, u32 index) = (void *)BPF_FUNC_tail_call;

#define SEND_SHUTDOWN 2

inline_always void splice_count(u32 counter)
{
	u64 *number = map_lookup(MAP(SPLICE_COUNTERS), &counter);

	if (number)
		__sync_fetch_and_add(number, 1);
}

/* Let the agent run the iterator "splice". One word is enough until it does. */
inline_always void splice_wake(void)
{
	u32 slot = SPLICE_COUNTER_WOKEN;
	u64 *woken = map_lookup(MAP(SPLICE_COUNTERS), &slot);
	u64 word = 1;

	if (woken && !__sync_val_compare_and_swap(woken, 0, 1))
		ringbuf_output(MAP(SPLICE_WAKES), &word, sizeof(word), 0);
}

inline_always bool splice_is_off(void)
{
	u32 slot = SPLICE_COUNTER_OFF;
	u64 *off = map_lookup(MAP(SPLICE_COUNTERS), &slot);

	return !off || *off;
}

inline_always u64 splice_key(u64 id, u32 side)
{
	return id << 1 | (side & 1);
}

/* From now on both directions pass by TCP, for ever. */
inline_always void splice_leave(struct splice *splice)
{
	if (!(__sync_fetch_and_or(&splice->flags, (u64)SPLICE_LEAVING) & SPLICE_LEAVING))
		splice_wake();
}

/*
 * Whether the queue of this end is empty, and stays so: SPLICE_LEAVING is set. In this order. What was read by recv is counted
 * after it was read, and copied_seq (what of it came by TCP) is looked at after that, so the difference is at most what was read
 * of the queue; redirected is at least what was put into it.
 */
inline_always bool is_drained(struct splice_end *end, struct splice *splice, void *tcp)
{
	if (!(__sync_fetch_and_or(&splice->flags, 0ULL) & SPLICE_LEAVING))
		return false;
	u32 redirected = (u32) * (volatile u64 *)&splice->side[(end->side ^ 1) & 1].redirected;
	u32 read = (u32)__sync_fetch_and_add(&end->read, 0);
	u32 by_tcp = LOAD(u32, tcp, TCP_SOCK_COPIED_SEQ) - end->read_base;

	return read - by_tcp == redirected;
}

/* Whether what an application dialled goes to another one of this node, and nobody has switched it off. */
inline_always bool splice_may_begin(struct socket_state *state)
{
	u64 netns = state->netns;
	struct pod *pod;

	if (!(state->flags & SOCKET_COUNTED) || (state->kind != VIA_DIRECT && state->kind != VIA_SELF))
		return false;
	pod = map_lookup(MAP(PODS), &netns);
	return pod && !(pod->flags & POD_NO_SPLICE);
}

/* A connection with an account is established. The id is the same at both ends; 0 when it may not be spliced. */
inline_always void splice_begin(struct bpf_sock_ops *ctx, struct bpf_sock *sk, u64 netns, u64 id, u32 side)
{
	void *tcp = to_tcp_sock(sk);

	/* TCP Fast Open: data before the connection was established. */
	if (splice_is_off() || !tcp || LOAD_POINTER(tcp, TCP_SOCK_FASTOPEN_RSK) ||
	    LOAD(u32, tcp, TCP_SOCK_WRITE_SEQ) != LOAD(u32, tcp, TCP_SOCK_SND_UNA) ||
	    LOAD(u64, tcp, TCP_SOCK_BYTES_ACKED) > 1)
		id = 0;
	struct splice_end end = {
		.id = id,
		.netns = netns,
		.sent_base = ctx->snd_nxt,
		.read_base = ctx->rcv_nxt,
		.side = side,
	};

	struct splice_end *stored = storage_get(MAP(SPLICE_ENDS), sk, &end, BPF_SK_STORAGE_GET_F_CREATE);

	/* Of a socket that was disconnected and has dialled again: what is there is about the connection before. */
	if (stored && (stored->flags & SPLICE_CLOSED))
		*stored = end;
}

/*
 * Puts what went past TCP at this end to what the socket's sequence numbers say was written and read. Of what was redirected to an
 * end in the splice some may still be in its queue: it has read what recv gave.
 */
inline_always void spliced_bytes(void *sk, u64 *sent, u64 *received)
{
	struct splice_end *end = storage_get(MAP(SPLICE_ENDS), sk, 0, 0);
	struct splice *splice;

	if (!end || !(end->flags & SPLICE_WANTED))
		return;
	splice = map_lookup(MAP(SPLICES), &end->id);
	if (!splice)
		return;
	u64 redirected = *(volatile u64 *)&splice->side[(end->side ^ 1) & 1].redirected;

	*sent += *(volatile u64 *)&splice->side[end->side & 1].redirected;
	if (!redirected)
		return;
	if (end->flags & SPLICE_IN)
		*received = *(volatile u64 *)&end->read;
	else
		*received += redirected;
}

/* The end is closed, and so is its account, in which this much is read. What it has not read yet stays in its queue: the end, or 0. */
inline_always struct splice_end *splice_closed(struct bpf_sock *sk, struct flow_key *flow, u64 accounted)
{
	struct splice_end *end = storage_get(MAP(SPLICE_ENDS), sk, 0, 0);
	struct splice *splice;

	if (!end)
		return 0;
	u64 id = end->id;
	u32 side = end->side & 1;

	end->flow = *flow;
	end->accounted = accounted;
	__sync_fetch_and_or(&end->flags, (u64)SPLICE_CLOSED);
	splice = map_lookup(MAP(SPLICES), &id);
	if (!splice)
		return end;
	u64 before = __sync_fetch_and_or(&splice->flags, (u64)SPLICE_LEAVING | (u64)SPLICE_GONE << side);

	/* The last one that has anything to do with it; an end that never came to it does not count. */
	if ((before & (SPLICE_GONE << (side ^ 1))) || !(before & (SPLICE_READY << (side ^ 1))))
		map_delete(MAP(SPLICES), &id);
	return end;
}

#endif
