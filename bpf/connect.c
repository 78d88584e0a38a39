/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * connect() and getpeername() of enrolled pods: where a connection goes. The address is rewritten to an endpoint, or to
 * a listener of ours in the pod's own namespace; getpeername() goes on to answer what the application dialled.
 */
#include "lib/address.h"
#include "lib/balance.h"
#include "lib/datagrams.h"
#include "lib/helpers.h"
#include "lib/policy.h"
#include "lib/refusal.h"
#include "lib/roles.h"

#define PASS 1
#define REFUSE 0

/* The way of one dial, as decided. */
struct dial {
	struct endpoint said; /* what connect() said */
	struct endpoint to;   /* what it is turned to */
	bool rewrite;
};

inline_always int refuse(int error)
{
	set_retval(-error);
	return REFUSE;
}

/* To a listener of ours in the pod's own namespace. */
inline_always int capture(struct dial *dial, const struct address *own, u16 port, struct socket_state *state)
{
	dial->to.address = *own;
	dial->to.port = bpf_htons(port);
	dial->rewrite = true;
	state->kind = VIA_CAPTURED;
	return PASS;
}

inline_always int refuse_unaddressed(u64 netns, struct pod *pod, struct endpoint *to, u32 destination)
{
	const struct address *other = is_ipv4(&to->address) ? &pod->address6 : &pod->address4;

	refuse_dial(netns, other, REASON_NO_ADDRESS, pod->identity, destination, &to->address, to->port,
		    DIRECTION_OUTBOUND);
	return refuse(ENETUNREACH);
}

/* NetworkPolicy forbids the pod to speak with that endpoint. */
inline_always int refuse_network(u64 netns, struct pod *pod, struct endpoint *to, struct peer *peer)
{
	refuse_dial(netns, own_address(pod, &to->address), REASON_NETWORK_POLICY, pod->identity,
		    peer ? peer->identity : 0, &to->address, to->port, DIRECTION_OUTBOUND);
	return refuse(EPERM);
}

/* The whole decision. Fills state and dial; PASS without SOCKET_* or kind means that we have nothing to do with it. */
inline_always int decide(void *ctx, u64 netns, struct pod *pod, u32 role, struct dial *dial,
			 struct socket_state *state)
{
	struct endpoint key = dial->said;
	struct found service = {};
	bool known = false;
	struct peer *peer;

	/* This host: ::1, or 127.0.0.1 for a socket that is bound to an IPv4 address. */
	if (is_none(&key.address))
		return PASS;
	/* The same in IPv4: 127.0.0.1, or the address that the socket is bound to, the pod's. */
	if (is_ipv4(&key.address) && key.address.word[3] == 0) {
		if (!pod || role != ROLE_NONE || !is_own_port(key.port))
			return PASS;
		refuse_dial(netns, &pod->address4, REASON_OWN_PORT, pod->identity, pod->identity,
			    &pod->address4, key.port, DIRECTION_OUTBOUND);
		return refuse(ECONNREFUSED);
	}
	/* First the services: an address of one is no peer's, and each look into a large map costs a connection something. */
	if (pod && role == ROLE_NONE)
		known = find_service(&key, &service);
	peer = known ? 0 : map_lookup(MAP(PEERS), &key.address);
	if (role == ROLE_ENVOY) {
		struct address loopback;

		if (!peer)
			return PASS;
		if (is_ipv4(&key.address))
			set_ipv4(&loopback, bpf_htonl(0x7f000001));
		else
			set_ipv6(&loopback, 0, 0, 0, bpf_htonl(1));
		return capture(dial, &loopback, PORT_OUTBOUND, state);
	}
	if (role == ROLE_PROBER) {
		state->kind = VIA_PROBE;
		state->identity = IDENTITY_PROBE;
		if (peer && (peer->flags & PEER_LOCAL) && (peer->flags & PEER_ENROLLED))
			state->flags |= SOCKET_RECORD;
		return PASS;
	}
	if (!pod)
		return PASS;

	const struct address *own = own_address(pod, &key.address);

	/* Without an address to dial from nobody could tell that it is this pod who does. */
	if (is_none(own) && peer && (peer->flags & PEER_ENROLLED))
		return refuse_unaddressed(netns, pod, &key, peer->identity);
	state->identity = pod->identity;
	state->source_address = *own;
	if (role == ROLE_AGENT || role == ROLE_NODEPROXY || role == ROLE_L7PROXY) {
		/* Nobody has judged what a proxy chose; but tunnels, in which the node proxy does. */
		bool chosen =
			role == ROLE_L7PROXY || (role == ROLE_NODEPROXY && key.port != bpf_htons(PORT_HBONE));

		if (chosen && !is_same_address(&key.address, own) &&
		    !network_allows(netns, DIRECTION_OUTBOUND, &key.address, IPPROTO_TCP, key.port))
			return refuse_network(netns, pod, &key, peer);
		if (role == ROLE_NODEPROXY && peer && (peer->flags & PEER_ENROLLED) &&
		    !(peer->flags & PEER_LOCAL) && key.port == bpf_htons(PORT_HBONE)) {
			/* To another node: the pod's veth lets nobody else's out. */
			state->kind = VIA_TUNNEL;
			return PASS;
		}
		/* The node proxy's, whatever l7proxy has heard of it. */
		if (role == ROLE_L7PROXY && peer && (peer->flags & PEER_ENROLLED) &&
		    !(peer->flags & PEER_LOCAL))
			return capture(dial, own, PORT_OUTBOUND, state);
		if (!peer || !(peer->flags & PEER_LOCAL) || !(peer->flags & PEER_ENROLLED)) {
			/* Not counted here, but remembered: NetworkPolicy may forbid it later. */
			if (chosen)
				state->kind = VIA_PLAIN;
			return PASS;
		}
		state->flags |= SOCKET_RECORD;
		if (role == ROLE_NODEPROXY && is_same_address(&key.address, own)) {
			/* A delivery: from the client's own address, judged by the node proxy. */
			state->kind = VIA_TUNNEL;
			state->identity = IDENTITY_TUNNEL;
			set_ipv6(&state->source_address, 0, 0, 0, 0);
			return PASS;
		}
		if (is_same_address(&key.address, own)) {
			/* A pod is never kept from itself. */
			state->kind = VIA_SELF;
			return PASS;
		}
		state->kind = VIA_DIRECT;
		goto judge_local;
	}

	/* An application. */
	if (is_own_port(key.port) && peer && (peer->flags & PEER_ENROLLED)) {
		refuse_dial(netns, own, REASON_OWN_PORT, pod->identity, peer->identity, &key.address,
			    key.port, DIRECTION_OUTBOUND);
		return refuse(ECONNREFUSED);
	}
	if (!known)
		known = find_node_port(&key, peer, &service);
	if (known && is_none(own))
		return refuse_unaddressed(netns, pod, &key, 0);
	if (known) {
		bool l7 = service.flags & SERVICE_L7;
		bool chosen = choose(netns, &key, &service, &dial->to);

		if (l7) {
			/* A node port, or an address from outside: l7proxy is told the service's own. */
			if (chosen) {
				state->destination_address = dial->to.address;
				state->destination_port = dial->to.port;
			}
			return capture(dial, own, PORT_OUTBOUND_L7, state);
		}
		if (!chosen || is_ipv4(&dial->to.address) != is_ipv4(&key.address)) {
			refuse_dial(netns, own, REASON_NO_BACKEND, pod->identity, 0, &dial->said.address,
				    dial->said.port, DIRECTION_OUTBOUND);
			return refuse(ECONNREFUSED);
		}
		key = dial->to;
		peer = map_lookup(MAP(PEERS), &key.address);
		dial->rewrite = true;
		state->destination_address = key.address;
		state->destination_port = key.port;
	}
	state->flow.source = pod->identity;
	state->flow.destination = peer ? peer->identity : 0;
	state->flow.source_zone = pod->zone;
	state->flow.destination_zone = peer ? peer->zone : 0;
	state->flow.protocol = IPPROTO_TCP;
	state->flow.port = key.port;
	state->flow.direction = DIRECTION_OUTBOUND;
	if (is_same_address(&key.address, own)) {
		state->kind = VIA_SELF;
		state->flags |= SOCKET_RECORD | SOCKET_COUNTED;
		return PASS;
	}
	if (!network_allows(netns, DIRECTION_OUTBOUND, &key.address, IPPROTO_TCP, key.port))
		return refuse_network(netns, pod, &key, peer);
	if (!peer || !(peer->flags & PEER_ENROLLED)) {
		state->kind = VIA_PLAIN;
		state->flags |= SOCKET_COUNTED;
		return PASS;
	}
	if (!(peer->flags & PEER_LOCAL))
		return capture(dial, own, PORT_OUTBOUND, state);
	state->kind = VIA_DIRECT;
	state->flags |= SOCKET_RECORD | SOCKET_COUNTED;

judge_local:;
	/*
	 * sk_lookup judges it in any case, by what sock_ops writes down. Asked here too, a refusal is an error of
	 * connect() and not a connection that hangs.
	 */
	u32 generation, reason;

	reason = judge_via(VIA_DIRECT, peer->netns, state->identity, &state->source_address, key.port,
			   &generation);
	if (reason) {
		refuse_dial(netns, own, reason, state->identity, peer->identity, &key.address, key.port,
			    DIRECTION_INBOUND);
		return refuse(EPERM);
	}
	return PASS;
}

inline_always int dialled(struct bpf_sock_addr *ctx, u64 netns, struct pod *pod, u32 role, struct dial *dial)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *state;

	if (!sk)
		return refuse(EPERM);
	/* What an earlier attempt with this socket left behind. */
	storage_delete(MAP(SOCKETS), sk);
	if (ctx->protocol != IPPROTO_TCP) {
		if (pod && role == ROLE_NONE && ctx->protocol == IPPROTO_MPTCP &&
		    !is_loopback(&dial->said.address)) {
			refuse_dial(netns, own_address(pod, &dial->said.address), REASON_MPTCP, pod->identity,
				    0, &dial->said.address, dial->said.port, DIRECTION_OUTBOUND);
			return refuse(EPROTONOSUPPORT);
		}
		return PASS;
	}
	if (is_loopback(&dial->said.address))
		return PASS;
	/* All zero, and of no interest to anybody else before it is established. */
	state = storage_get(MAP(SOCKETS), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		count(COUNTER_FULL_SOCKETS);
		if (pod)
			refuse_dial(netns, own_address(pod, &dial->said.address), REASON_MAP_FULL,
				    pod->identity, 0, &dial->said.address, dial->said.port,
				    DIRECTION_OUTBOUND);
		return refuse(ENOMEM);
	}
	state->netns = netns;
	state->destination_address = dial->said.address;
	state->destination_port = dial->said.port;
	state->service_address = dial->said.address;
	state->service_port = dial->said.port;
	state->flags = SOCKET_ACTIVE;
	int verdict = decide(ctx, netns, pod, role, dial, state);

	if (verdict == REFUSE || !state->kind)
		storage_delete(MAP(SOCKETS), sk);
	else if (dial->rewrite)
		state->flags |= SOCKET_REWRITTEN;
	return verdict;
}

/* A pod that joins or leaves: what its applications dial goes as without a mesh. */
inline_always bool passes(struct bpf_sock_addr *ctx, struct pod *pod, u32 role)
{
	struct bpf_sock *sk = ctx->sk;

	if (!pod || !(pod->flags & POD_PASSING) || role != ROLE_NONE)
		return false;
	/* What an earlier attempt with this socket left behind. */
	if (sk)
		storage_delete(MAP(SOCKETS), sk);
	return true;
}

int connect4(struct bpf_sock_addr *ctx)
{
	if (ctx->protocol == IPPROTO_UDP)
		return direct4(ctx, true);

	u64 netns = netns_cookie(ctx);
	struct pod *pod = map_lookup(MAP(PODS), &netns);
	u32 role = role_of_current();
	struct dial dial = {};

	if (!pod && role != ROLE_PROBER && role != ROLE_ENVOY)
		return PASS;
	if (passes(ctx, pod, role))
		return PASS;
	set_ipv4(&dial.said.address, ctx->user_ip4);
	dial.said.port = ctx->user_port;
	dial.said.protocol = IPPROTO_TCP;
	if (dialled(ctx, netns, pod, role, &dial) == REFUSE)
		return REFUSE;
	if (dial.rewrite) {
		ctx->user_ip4 = dial.to.address.word[3];
		ctx->user_port = dial.to.port;
	}
	return PASS;
}

int connect6(struct bpf_sock_addr *ctx)
{
	if (ctx->protocol == IPPROTO_UDP)
		return direct6(ctx, true);

	u64 netns = netns_cookie(ctx);
	struct pod *pod = map_lookup(MAP(PODS), &netns);
	u32 role = role_of_current();
	struct dial dial = {};

	if (!pod && role != ROLE_PROBER && role != ROLE_ENVOY)
		return PASS;
	if (passes(ctx, pod, role))
		return PASS;
	/* IPv4 comes this way too, in the very form that addresses have here. */
	set_ipv6(&dial.said.address, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	dial.said.port = ctx->user_port;
	dial.said.protocol = IPPROTO_TCP;
	if (dialled(ctx, netns, pod, role, &dial) == REFUSE)
		return REFUSE;
	if (dial.rewrite) {
		ctx->user_ip6[0] = dial.to.address.word[0];
		ctx->user_ip6[1] = dial.to.address.word[1];
		ctx->user_ip6[2] = dial.to.address.word[2];
		ctx->user_ip6[3] = dial.to.address.word[3];
		ctx->user_port = dial.to.port;
	}
	return PASS;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *state = sk ? storage_get(MAP(SOCKETS), sk, 0, 0) : 0;

	if (state && (state->flags & SOCKET_REWRITTEN)) {
		ctx->user_ip4 = state->service_address.word[3];
		ctx->user_port = state->service_port;
		return PASS;
	}
	if (!state)
		answer_as_dialled4(ctx);
	return PASS;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_state *state = sk ? storage_get(MAP(SOCKETS), sk, 0, 0) : 0;

	if (state && (state->flags & SOCKET_REWRITTEN)) {
		ctx->user_ip6[0] = state->service_address.word[0];
		ctx->user_ip6[1] = state->service_address.word[1];
		ctx->user_ip6[2] = state->service_address.word[2];
		ctx->user_ip6[3] = state->service_address.word[3];
		ctx->user_port = state->service_port;
		return PASS;
	}
	if (!state)
		answer_as_dialled6(ctx);
	return PASS;
}
