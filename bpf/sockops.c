/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The life of a connection: who connects is written down when the client's port is known, taken up when the server's end
 * is established, and every counted end is opened and closed in the accounts.
 */
#include "lib/account.h"
#include "lib/address.h"
#include "lib/connecting.h"
#include "lib/helpers.h"
#include "lib/policy.h"
#include "lib/refusal.h"
#include "lib/splice.h"

inline_always bool tuple_of(struct bpf_sock_ops *ctx, bool active, struct tuple *tuple)
{
	struct address *local = active ? &tuple->client_address : &tuple->server_address;
	struct address *remote = active ? &tuple->server_address : &tuple->client_address;
	u32 local_port_host = ctx->local_port, remote_port = ctx->remote_port;

	if (ctx->family != AF_INET && ctx->family != AF_INET6)
		return false;
	/* IPv4 of an IPv6 socket has its addresses in both places, from connect() on in this one. */
	if (ctx->family == AF_INET6 &&
	    (ctx->remote_ip6[0] | ctx->remote_ip6[1] | (ctx->remote_ip6[2] ^ bpf_htonl(0xffff)))) {
		set_ipv6(local, ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]);
		set_ipv6(remote, ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2],
			 ctx->remote_ip6[3]);
	} else {
		u32 local_ip4 = ctx->local_ip4, remote_ip4 = ctx->remote_ip4;

		KEEP(local_ip4);
		KEEP(remote_ip4);
		set_ipv4(local, local_ip4);
		set_ipv4(remote, remote_ip4);
	}
	__be16 local_port = bpf_htons((u16)local_port_host);
	/* On little-endian machines the kernel shifts it up. */
	__be16 port = bpf_htons((u16)bpf_ntohl(remote_port));

	tuple->client_port = active ? local_port : port;
	tuple->server_port = active ? port : local_port;
	return true;
}

inline_always void forget_captured(u64 netns, struct tuple *tuple)
{
	struct captured_key key = {
		.netns = netns,
		.client_address = tuple->client_address,
		.client_port = tuple->client_port,
		.listener_port = tuple->server_port,
	};

	drop_captured(&key);
}

/* SYN goes out: the client's port is known now. */
inline_always void dialling(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_state *state = storage_get(MAP(SOCKETS), sk, 0, 0);
	struct tuple tuple = {};

	if (!state || !tuple_of(ctx, true, &tuple))
		return;
	state->tuple = tuple;
	state->cookie = socket_cookie(ctx);
	set_cb_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
	if (state->kind != VIA_CAPTURED && !(state->flags & SOCKET_RECORD))
		return;
	/* Whoever dials from an address that is not the pod's stays unnamed: plain, and refused where that counts. */
	if (!is_none(&state->source_address) &&
	    !is_same_address(&state->source_address, &tuple.client_address))
		return;
	struct who who = { .netns = state->netns, .identity = state->identity, .kind = state->kind };

	if (splice_may_begin(state))
		who.splice = socket_cookie(ctx);

	if (state->kind == VIA_CAPTURED) {
		struct captured_key key = {
			.netns = state->netns,
			.client_address = tuple.client_address,
			.client_port = tuple.client_port,
			.listener_port = tuple.server_port,
		};
		struct captured value = {
			.destination_address = state->destination_address,
			.service_address = state->service_address,
			.destination_port = state->destination_port,
			.service_port = state->service_port,
			.identity = state->identity,
		};

		if (!put_captured(&key, &value))
			return; /* and so without a record: the listener will not be given it */
	}
	if (!put_connecting(&tuple, &who) && state->kind == VIA_CAPTURED)
		forget_captured(state->netns, &tuple);
}

/*
 * What was captured is known until the listener's end closes: a client may say all it has and be gone before the proxy has
 * accepted. An entry without that end (never established, or of Envoy, in a namespace that is no pod's) goes with the client.
 */
inline_always void keep_captured(struct bpf_sock_ops *ctx, struct bpf_sock *sk, u64 netns,
				 struct tuple *tuple)
{
	struct socket_state state = { .netns = netns, .tuple = *tuple, .kind = VIA_CAPTURED };

	set_cb_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
	if (storage_get(MAP(SOCKETS), sk, &state, BPF_SK_STORAGE_GET_F_CREATE))
		return;
	count(COUNTER_FULL_SOCKETS);
	forget_captured(netns, tuple);
}

/* The server's end is established: its connector is taken up, and judged by the policy of now. */
inline_always void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	u64 netns = netns_cookie(ctx);
	struct pod *pod = map_lookup(MAP(PODS), &netns);
	struct tuple tuple = {};
	struct socket_state state = {};
	struct who *who;
	struct peer *peer;
	u64 splice = 0;
	u32 reason;

	if (!pod || !tuple_of(ctx, false, &tuple))
		return;
	if (is_loopback(&tuple.server_address))
		return;
	state.kind = VIA_PLAIN;
	state.identity = IDENTITY_PLAIN;
	who = map_lookup(MAP(CONNECTING), &tuple);
	if (who) {
		state.kind = who->kind;
		state.identity = who->identity;
		/* Before it is dropped: its memory may be another's at once. */
		splice = who->splice;
		drop_connecting(who->netns, &tuple);
	} else {
		/* A client that dialled, was admitted and has already gone took its record along: it was this one. */
		peer = map_lookup(MAP(PEERS), &tuple.client_address);
		if (peer && (peer->flags & PEER_LOCAL) && (peer->flags & PEER_ENROLLED) &&
		    !(peer->flags & PEER_JOINING)) {
			state.kind = VIA_DIRECT;
			state.identity = peer->identity;
		}
	}
	if (is_same_address(&tuple.server_address, own_address(pod, &tuple.server_address)) &&
	    is_own_port(tuple.server_port)) {
		if (state.kind == VIA_CAPTURED)
			keep_captured(ctx, sk, netns, &tuple);
		return;
	}
	/* Not judged now, so not judged later either: it lives on as those do that are older than the mesh. */
	if (state.kind == VIA_PLAIN && (pod->flags & POD_OPEN))
		return;
	state.netns = netns;
	state.cookie = socket_cookie(ctx);
	state.tuple = tuple;
	state.flow.source = state.identity;
	state.flow.destination = pod->identity;
	state.flow.source_zone = zone_of(&tuple.client_address);
	state.flow.destination_zone = pod->zone;
	state.flow.port = tuple.server_port;
	state.flow.protocol = IPPROTO_TCP;
	state.flow.direction = DIRECTION_INBOUND;
	if (state.kind != VIA_TUNNEL)
		state.flags |= SOCKET_COUNTED;
	reason = judge_via(state.kind, netns, state.identity, &tuple.client_address, tuple.server_port,
			   &state.generation);
	if (reason) {
		state.flags |= SOCKET_REVOKED;
		state.flow.verdict = REASON_REVOKED;
	}
	set_cb_flags(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);

	struct socket_state *stored = storage_get(MAP(SOCKETS), sk, &state, BPF_SK_STORAGE_GET_F_CREATE);

	if (!stored)
		count(COUNTER_FULL_SOCKETS);
	if (!stored || reason) {
		/* Nothing here can end it: the agent does, who is told of each. */
		count(REASON_REVOKED);
		tell(netns, &tuple, REASON_REVOKED, state.identity, pod->identity);
	}
	if (!stored)
		return;
	if (stored->flags & SOCKET_COUNTED)
		account_open(stored);
	else
		stored->flags |= SOCKET_OPEN;
	if (stored->flags & SOCKET_COUNTED)
		splice_begin(ctx, sk, netns, pod->flags & POD_NO_SPLICE ? 0 : splice, 1);
}

inline_always void connected(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_state *state = storage_get(MAP(SOCKETS), sk, 0, 0);

	if (!state)
		return;
	if (state->flags & SOCKET_COUNTED)
		account_open(state);
	else
		state->flags |= SOCKET_OPEN;
	if (state->flags & SOCKET_COUNTED)
		splice_begin(ctx, sk, state->netns, splice_may_begin(state) ? socket_cookie(ctx) : 0, 0);
}

inline_always void closed(struct bpf_sock_ops *ctx, struct bpf_sock *sk, u32 old_state)
{
	struct socket_state *state = storage_get(MAP(SOCKETS), sk, 0, 0);

	if (!state)
		return;
	struct tuple tuple = state->tuple;

	if (state->kind == VIA_CAPTURED &&
	    (!(state->flags & SOCKET_ACTIVE) || is_none(&state->source_address) ||
	     map_lookup(MAP(CONNECTING), &tuple)))
		forget_captured(state->netns, &tuple);
	if ((state->flags & SOCKET_ACTIVE) && (state->kind == VIA_CAPTURED || (state->flags & SOCKET_RECORD)))
		drop_connecting(state->netns, &tuple);
	if ((state->flags & SOCKET_COUNTED) && (state->flags & SOCKET_OPEN)) {
		void *tcp = to_tcp_sock(sk);

		if (tcp) {
			u64 read = account_close(state, sk, tcp, old_state);

			struct splice_end *end = splice_closed(sk, &state->flow, read);

			/* What was read while the account was closed; from now on whoever reads sees to it. */
			if (end)
				account_late_read(end, __sync_fetch_and_add(&end->read, 0));
		}
	}
	if (state->flags & SOCKET_OPEN)
		note_closed(&tuple);
	storage_delete(MAP(SOCKETS), sk);
}

int sock_ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		dialling(ctx, sk);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		connected(ctx, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		accepted(ctx, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == BPF_TCP_CLOSE)
			closed(ctx, sk, ctx->args[0]);
		break;
	}
	return 1;
}
