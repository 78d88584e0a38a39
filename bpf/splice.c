/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The programs of the splice; see lib/splice.h for its rules. */
#include "lib/account.h"
#include "lib/helpers.h"
#include "lib/splice.h"

#define O_NONBLOCK 04000
#define MSG_OOB 1
#define MSG_PEEK 2
#define MSG_TRUNC 0x20
#define MSG_WAITALL 0x100
#define MSG_ERRQUEUE 0x2000

#define SOL_SOCKET 1
#define SO_RCVLOWAT 18

/* struct bpf_iter__bpf_sk_storage_map of the kernel; struct bpf_iter__tcp has a socket at the second place. */
#define SPLICE_ITERATOR_META 0
#define SPLICE_ITERATOR_SOCKET 16
#define TCP_ITERATOR_SOCKET 8
#define SPLICE_ITERATOR_VALUE 24

/* sendmsg on a socket in splice_sockets, which is locked. SK_PASS without a redirect is TCP. */
int splice_message(struct sk_msg_md *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return SK_PASS;
	struct splice_end *end = storage_get(MAP(SPLICE_ENDS), sk, 0, 0);

	if (!end)
		return SK_PASS;
	u64 id = end->id;
	u32 side = end->side & 1;
	struct splice *splice = map_lookup(MAP(SPLICES), &id);
	void *tcp = to_tcp_sock(sk);

	if (!splice || !tcp)
		return SK_PASS;
	struct splice_side *mine = &splice->side[side], *theirs = &splice->side[side ^ 1];

	if (*(volatile u64 *)&splice->flags != SPLICE_RUNS)
		goto pass;
	/* After the peer's FIN or our own, TCP answers to what is sent. */
	if (LOAD(u8, tcp, SOCK_STATE) != BPF_TCP_ESTABLISHED ||
	    (LOAD(u8, tcp, SOCK_SHUTDOWN) & SEND_SHUTDOWN))
		goto pass;
	if (LOAD_POINTER(tcp, SOCK_ULP)) {
		splice_leave(splice);
		goto pass;
	}
	u32 size = ctx->size;
	u32 written = LOAD(u32, tcp, TCP_SOCK_WRITE_SEQ) - mine->sent_base;
	u32 out = (u32)mine->redirected + written - (u32) * (volatile u64 *)&theirs->read;

	/* A thread that was on its way into TCP when the socket entered has not come by here. */
	if (!mine->redirects || mine->written != written) {
		if (out)
			goto pass;
		mine->redirects = 1;
		mine->written = written;
	} else if (out > SPLICE_CAP) {
		splice_count(SPLICE_COUNTER_OVERFLOWS);
		splice_leave(splice);
		goto pass;
	}
	__sync_fetch_and_add(&mine->redirected, size);
	if (__sync_fetch_and_or(&splice->flags, 0ULL) == SPLICE_RUNS) {
		u64 key = splice_key(id, side ^ 1);

		if (msg_redirect_hash(ctx, MAP(SPLICE_SOCKETS), &key, BPF_F_INGRESS) == SK_PASS)
			return SK_PASS;
		/* The peer's socket is closed. */
		splice_leave(splice);
	}
	__sync_fetch_and_sub(&mine->redirected, (u64)size);
pass:
	mine->redirects = 0;
	return SK_PASS;
}

/* The end may be spliced as far as it is concerned: once both say so, the agent's walk takes them in. */
inline_always void splice_want(struct splice_end *end, u64 read)
{
	u64 id = end->id;
	u32 side = end->side & 1;
	struct splice *splice = map_lookup(MAP(SPLICES), &id);

	if (!splice) {
		struct splice empty = {};

		map_update(MAP(SPLICES), &id, &empty, BPF_NOEXIST);
		splice = map_lookup(MAP(SPLICES), &id);
	}
	if (!splice) {
		splice_count(SPLICE_COUNTER_FULL);
		__sync_fetch_and_or(&end->flags, (u64)SPLICE_NEVER);
		return;
	}
	splice->side[side].sent_base = end->sent_base;
	splice->side[side].read_base = end->read_base;
	splice->side[side].read = read;
	__sync_fetch_and_or(&end->flags, (u64)SPLICE_WANTED);
	if (__sync_fetch_and_or(&splice->flags, (u64)SPLICE_READY << side) & (SPLICE_READY << (side ^ 1)))
		splice_wake();
	/* It was closed meanwhile, by another thread or the peer. */
	if (__sync_fetch_and_or(&end->flags, 0ULL) & SPLICE_CLOSED)
		map_delete(MAP(SPLICES), &id);
}

/* recv, read and their kin have returned; the socket is not locked. */
int sock_recv_length(void *ctx)
{
	void *sk = LOAD_POINTER(ctx, 0);
	int length = (int)LOAD(u64, ctx, 8);
	int flags = (int)LOAD(u64, ctx, 16);
	struct splice_end *end = storage_get(MAP(SPLICE_ENDS), sk, 0, 0);

	if (!end)
		return 0;
	void *socket = LOAD_POINTER(sk, SOCK_SOCKET);
	void *file = LOAD_POINTER(socket, SOCKET_FILE);

	if (flags & (MSG_PEEK | MSG_ERRQUEUE))
		return 0;
	if (length <= 0 && !end->id)
		return 0;
	/* The kernel wakes a blocking reader of a spliced socket for nothing, and forgets what MSG_WAITALL and others mean. */
	if (!(LOAD(u32, file, FILE_FLAGS) & O_NONBLOCK) || (flags & (MSG_WAITALL | MSG_OOB | MSG_TRUNC))) {
		if (!(__sync_fetch_and_or(&end->flags, (u64)SPLICE_NEVER) & SPLICE_NEVER)) {
			struct splice *splice = map_lookup(MAP(SPLICES), &end->id);

			if (splice)
				splice_leave(splice);
		}
	}
	if (length <= 0)
		return 0;
	u64 read = __sync_fetch_and_add(&end->read, (u64)length) + length;

	if (__sync_fetch_and_or(&end->flags, 0ULL) & SPLICE_CLOSED) {
		account_late_read(end, read);
		return 0;
	}
	if (!end->id)
		return 0;
	end->reads++;
	if (end->flags & SPLICE_WANTED) {
		struct splice *splice = map_lookup(MAP(SPLICES), &end->id);

		/* Another reader may have been faster: then this is too little until the next one, which only means TCP. */
		if (!splice)
			return 0;
		*(volatile u64 *)&splice->side[end->side & 1].read = read;
		/* It may leave now, and what TCP has for it may be all that comes: see has_unread(). */
		if (end->flags & SPLICE_IN && *(volatile u64 *)&splice->flags & SPLICE_LEAVING) {
			void *tcp = to_tcp_sock(sk);

			if (tcp && is_drained(end, splice, tcp))
				splice_wake();
		}
		return 0;
	}
	if ((end->flags & SPLICE_NEVER) || end->reads < SPLICE_READS)
		return 0;
	splice_want(end, read);
	return 0;
}

/* Stays attached for ever: exactly one version of the above sees each recv, also while an upgrade replaces it. */
int sock_recv_length_entry(void *ctx)
{
	tail_call(ctx, MAP(SPLICE_PROGRAMS), 0);
	return 0;
}

/* What cannot be in the splice although it reads as it should. */
inline_always bool may_enter(void *sk, void *tcp, u64 read)
{
	void *socket = LOAD_POINTER(sk, SOCK_SOCKET);
	void *file = LOAD_POINTER(socket, SOCKET_FILE);

	if (LOAD(u8, sk, SOCK_STATE) != BPF_TCP_ESTABLISHED || !(LOAD(u32, file, FILE_FLAGS) & O_NONBLOCK))
		return false;
	/* Bulk gains nothing: what it reads for each segment that it sends would be more than the queue takes. */
	if (read > ((u64)LOAD(u32, tcp, TCP_SOCK_DATA_SEGS_OUT) + 1) * SPLICE_BULK)
		return false;
	if (LOAD_POINTER(tcp, SOCK_ULP) || LOAD(u16, tcp, TCP_SOCK_URG_DATA))
		return false;
	return !(LOAD(u64, sk, SOCK_FLAGS) & (1ULL << SOCK_ZEROCOPY | 1ULL << SOCK_URGINLINE));
}

/* They are the two ends of one connection: each begins to read what the other begins to write with. */
inline_always bool is_pair(struct splice *splice)
{
	return splice->side[0].sent_base == splice->side[1].read_base &&
	       splice->side[1].sent_base == splice->side[0].read_base;
}

/*
 * TCP has bytes for this end that it has not read. While it is in the splice it may take them for none: FIONREAD counts only what
 * the splice has, and a reader that was told of both at once may take the last, short read of the one for the end of both.
 */
inline_always bool has_unread(void *tcp)
{
	return LOAD(u32, tcp, TCP_SOCK_RCV_NXT) != LOAD(u32, tcp, TCP_SOCK_COPIED_SEQ);
}

inline_always void splice_report(void *ctx, u64 netns, u32 what)
{
	void *seq = LOAD_POINTER(LOAD_POINTER(ctx, SPLICE_ITERATOR_META), 0);
	u64 told = netns << SPLICE_STEP_BITS | what;

	seq_write(seq, &told, sizeof(told));
}

/*
 * The agent's walk over all ends. The socket is not locked, and may end while we look at it and its memory be another socket's:
 * so it is looked at again once splice_sockets holds it, before anybody is told.
 */
int bpf_iter__bpf_sk_storage_map__splice(void *ctx)
{
	void *sk = LOAD_POINTER(ctx, SPLICE_ITERATOR_SOCKET);
	struct splice_end *end = LOAD_POINTER(ctx, SPLICE_ITERATOR_VALUE);

	if (!sk || !end || !(end->flags & SPLICE_WANTED) || (end->flags & SPLICE_CLOSED))
		return 0;
	u64 id = end->id, netns = end->netns;
	u32 side = end->side & 1;
	u64 key = splice_key(id, side);
	struct splice *splice = map_lookup(MAP(SPLICES), &id);
	void *tcp = to_tcp_sock(sk);
	struct pod *pod = map_lookup(MAP(PODS), &netns);

	if (!splice || !tcp)
		return 0;
	/* It entered at a walk before: since then all should have gone past TCP. */
	if (splice_is_off() || !pod || (pod->flags & POD_NO_SPLICE) ||
	    ((end->flags & SPLICE_IN) && has_unread(tcp)))
		splice_leave(splice);
	u64 flags = *(volatile u64 *)&splice->flags;

	if (end->flags & SPLICE_IN) {
		if (!(flags & SPLICE_LEAVING))
			return 0;
		if (!is_drained(end, splice, tcp)) {
			splice_report(ctx, netns, SPLICE_WAITS);
			return 0;
		}
		if (!map_delete(MAP(SPLICE_SOCKETS), &key)) {
			__sync_fetch_and_or(&end->flags, (u64)SPLICE_NEVER);
			__sync_fetch_and_and(&end->flags, ~(u64)SPLICE_IN);
			splice_count(SPLICE_COUNTER_LEFT);
			splice_report(ctx, netns, has_unread(tcp) ? SPLICE_LEFT_UNREAD : SPLICE_LEFT);
		}
		return 0;
	}
	if (flags & SPLICE_LEAVING || (flags & SPLICE_READY_BOTH) != SPLICE_READY_BOTH)
		return 0;
	if ((end->flags & SPLICE_NEVER) || !is_pair(splice) || !may_enter(sk, tcp, end->read)) {
		splice_leave(splice);
		return 0;
	}
	if (map_update(MAP(SPLICE_SOCKETS), &key, sk, BPF_NOEXIST)) {
		splice_count(SPLICE_COUNTER_FULL);
		splice_leave(splice);
		return 0;
	}
	if (storage_get(MAP(SPLICE_ENDS), sk, 0, 0) != end) {
		map_delete(MAP(SPLICE_SOCKETS), &key);
		return 0;
	}
	__sync_fetch_and_or(&end->flags, (u64)SPLICE_IN);
	__sync_fetch_and_or(&splice->flags, (u64)SPLICE_JOINED << side);
	splice_count(SPLICE_COUNTER_ENTERED);
	splice_report(ctx, netns, SPLICE_ENTERED);
	return 0;
}

/*
 * Over the sockets of one namespace, which are locked here: ends that have left are told again of what they have not read. Setting
 * SO_RCVLOWAT to what it is does that.
 */
int bpf_iter__tcp__nudge(void *ctx)
{
	void *sk = LOAD_POINTER(ctx, TCP_ITERATOR_SOCKET);
	void *tcp = sk ? to_tcp_sock(sk) : 0;

	if (!tcp)
		return 0;
	struct splice_end *end = storage_get(MAP(SPLICE_ENDS), tcp, 0, 0);

	if (!end || !(end->flags & SPLICE_WANTED) || (end->flags & (SPLICE_IN | SPLICE_CLOSED)) ||
	    !has_unread(tcp))
		return 0;
	u32 least = LOAD(u32, tcp, SOCK_RCVLOWAT);

	set_option(tcp, SOL_SOCKET, SO_RCVLOWAT, &least, sizeof(least));
	return 0;
}
