/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * UDP of enrolled pods: which endpoint a socket's datagrams to a service go to, and whose answers an endpoint's are.
 *
 * The kernel holds the socket's lock around each of the hooks that call this, so a socket's storage has one writer.
 * It holds one service: of a connected socket the one that it is connected to, else the one that it sent to last.
 * What a socket that talks to several services used before is in the map datagrams, and forgotten when there is no room.
 */
#ifndef MYCEL_DATAGRAMS_H
#define MYCEL_DATAGRAMS_H

#include "lib/address.h"
#include "lib/balance.h"
#include "lib/helpers.h"
#include "lib/policy.h"
#include "lib/refusal.h"
#include "lib/roles.h"

inline_always void note_datagrams(u64 socket, u32 kind, struct endpoint *of, struct endpoint *other)
{
	struct datagram_key key = { .socket = socket, .endpoint = *of, .kind = kind };
	struct endpoint *noted = map_lookup(MAP(DATAGRAMS), &key);

	if (noted && same_endpoint(noted, other))
		return;
	map_update(MAP(DATAGRAMS), &key, other, BPF_ANY);
}

inline_always void note_both(u64 socket, struct endpoint *service, struct endpoint *endpoint)
{
	note_datagrams(socket, DATAGRAM_CHOSEN, service, endpoint);
	note_datagrams(socket, DATAGRAM_ANSWERS, endpoint, service);
}

/* From now on the endpoint's datagrams to this socket are the service's answers; false when there is no room for that. */
inline_always bool remember(void *ctx, struct bpf_sock *sk, struct datagram_socket *state,
			    struct endpoint *service, struct endpoint *endpoint)
{
	if (!state) {
		struct datagram_socket fresh = { .service = *service, .endpoint = *endpoint };

		return storage_get(MAP(UDP_SOCKETS), sk, &fresh, BPF_SK_STORAGE_GET_F_CREATE) != 0;
	}
	bool same_service = same_endpoint(&state->service, service);

	if (same_service && same_endpoint(&state->endpoint, endpoint))
		return true;
	u64 socket = socket_cookie(ctx);

	if (state->connected) {
		note_both(socket, service, endpoint);
		return true;
	}
	/* An endpoint that was left may still answer. */
	if (state->service.port) {
		if (same_service)
			note_datagrams(socket, DATAGRAM_ANSWERS, &state->endpoint, &state->service);
		else
			note_both(socket, &state->service, &state->endpoint);
	}
	state->service = *service;
	state->endpoint = *endpoint;
	return true;
}

/* Sent to itself an endpoint answers as itself. */
inline_always void forget_answers(void *ctx, struct datagram_socket *state, struct endpoint *endpoint)
{
	if (!state || state->connected)
		return;
	if (state->service.port && same_endpoint(&state->endpoint, endpoint))
		__builtin_memset(state, 0, sizeof(*state));
	struct datagram_key key = { .socket = socket_cookie(ctx),
				    .endpoint = *endpoint,
				    .kind = DATAGRAM_ANSWERS };

	map_delete(MAP(DATAGRAMS), &key);
}

/* The endpoint that this socket's datagrams to the service go to, as long as it is one; else another. */
inline_always bool choose_for_socket(void *ctx, u64 netns, struct datagram_socket *state,
				     struct endpoint *dialled, struct endpoint *key, struct found *service,
				     struct endpoint *chosen)
{
	bool affinity = service->flags & SERVICE_AFFINITY;

	if (!affinity && state) {
		struct endpoint *had = &state->endpoint;

		if (!same_endpoint(&state->service, dialled)) {
			struct datagram_key noted = { .socket = socket_cookie(ctx),
						      .endpoint = *dialled,
						      .kind = DATAGRAM_CHOSEN };

			had = map_lookup(MAP(DATAGRAMS), &noted);
		}
		if (had) {
			*chosen = *had;
			BARRIER();
			if (is_member(key, service, chosen))
				return true;
		}
	}
	return choose(netns, key, service, chosen);
}

/* Whether NetworkPolicy of the pod, or a policy of a destination on this node, refuses what the pod would say first. */
inline_always bool peer_refuses(u64 netns, struct pod *pod, struct peer *peer, struct endpoint *to)
{
	const struct address *own = own_address(pod, &to->address);
	u32 destination = peer ? peer->identity : 0;
	u32 generation, reason;

	if (peer && peer->netns == netns)
		return false;
	if (!network_allows(netns, DIRECTION_OUTBOUND, &to->address, IPPROTO_UDP, to->port)) {
		refuse_first(netns, own, REASON_NETWORK_POLICY, pod->identity, destination, &to->address,
			     to->port, IPPROTO_UDP, DIRECTION_OUTBOUND);
		return true;
	}
	if (!peer || !(peer->flags & PEER_LOCAL) || !(peer->flags & PEER_ENROLLED))
		return false;
	reason = judge(peer->netns, pod->identity, own, to->port, &generation);
	if (!reason && !network_allows(peer->netns, DIRECTION_INBOUND, own, IPPROTO_UDP, to->port))
		reason = REASON_NETWORK_POLICY;
	if (!reason)
		return false;
	refuse_first(netns, own, reason, pod->identity, destination, &to->address, to->port, IPPROTO_UDP,
		     DIRECTION_INBOUND);
	return true;
}

/*
 * Where datagrams to an address go, by sendmsg() (connecting: by connect()). `to` is the address first, and then where they
 * go; 0, or the error that refuses them.
 */
inline_always int direct_datagrams(struct bpf_sock_addr *ctx, u64 netns, struct pod *pod, struct endpoint *to,
				   bool connecting)
{
	struct endpoint dialled = *to, key = *to;
	struct bpf_sock *sk = ctx->sk;
	struct datagram_socket *state;
	struct found service = {};
	struct peer *peer;
	bool known;

	if (!sk)
		return EPERM;
	if (is_loopback(&to->address) || is_this_host(&to->address))
		return 0;
	state = storage_get(MAP(UDP_SOCKETS), sk, 0, 0);
	known = find_service(&key, &service);
	if (!known) {
		peer = map_lookup(MAP(PEERS), &to->address);
		known = find_node_port(&key, peer, &service);
	}
	if (known) {
		if (!choose_for_socket(ctx, netns, state, &dialled, &key, &service, to) ||
		    is_ipv4(&to->address) != is_ipv4(&dialled.address)) {
			refuse_first(netns, own_address(pod, &dialled.address), REASON_NO_BACKEND,
				     pod->identity, 0, &dialled.address, dialled.port, IPPROTO_UDP,
				     DIRECTION_OUTBOUND);
			return ECONNREFUSED;
		}
		peer = map_lookup(MAP(PEERS), &to->address);
	}
	/*
	 * Judged on its way in any case. Asked here too, a refusal is an error that the application sees; but not of what may be an
	 * answer, which is judged as what it answers: servers answer from the port that they are bound to, some by connect().
	 */
	if ((known || (connecting && !sk->src_port)) && peer_refuses(netns, pod, peer, to))
		return EPERM;
	if (!known) {
		forget_answers(ctx, state, to);
		return 0;
	}
	if (!remember(ctx, sk, state, &dialled, to)) {
		count(COUNTER_FULL_SOCKETS);
		return ENOMEM;
	}
	if (connecting) {
		state = storage_get(MAP(UDP_SOCKETS), sk, 0, 0);
		if (state)
			state->connected = 1;
	}
	return 0;
}

/* What the application dialled, in place of where a datagram came from or goes to; false when it is the same. */
inline_always bool as_dialled(struct bpf_sock_addr *ctx, struct endpoint *endpoint)
{
	struct bpf_sock *sk = ctx->sk;
	struct datagram_socket *state = sk ? storage_get(MAP(UDP_SOCKETS), sk, 0, 0) : 0;

	if (!state)
		return false;
	if (state->service.port && same_endpoint(&state->endpoint, endpoint)) {
		*endpoint = state->service;
		return true;
	}
	struct datagram_key key = { .socket = socket_cookie(ctx),
				    .endpoint = *endpoint,
				    .kind = DATAGRAM_ANSWERS };
	struct endpoint *service = map_lookup(MAP(DATAGRAMS), &key);

	if (!service)
		return false;
	*endpoint = *service;
	return true;
}

inline_always void read4(struct bpf_sock_addr *ctx, struct endpoint *endpoint)
{
	set_ipv4(&endpoint->address, ctx->user_ip4);
	endpoint->port = ctx->user_port;
	endpoint->protocol = IPPROTO_UDP;
}

inline_always void read6(struct bpf_sock_addr *ctx, struct endpoint *endpoint)
{
	set_ipv6(&endpoint->address, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	endpoint->port = ctx->user_port;
	endpoint->protocol = IPPROTO_UDP;
}

inline_always void write4(struct bpf_sock_addr *ctx, const struct endpoint *endpoint)
{
	ctx->user_ip4 = endpoint->address.word[3];
	ctx->user_port = endpoint->port;
}

inline_always void write6(struct bpf_sock_addr *ctx, const struct endpoint *endpoint)
{
	ctx->user_ip6[0] = endpoint->address.word[0];
	ctx->user_ip6[1] = endpoint->address.word[1];
	ctx->user_ip6[2] = endpoint->address.word[2];
	ctx->user_ip6[3] = endpoint->address.word[3];
	ctx->user_port = endpoint->port;
}

/* connect() and sendmsg(): 0 for a refusal, else `to` says where it goes. */
inline_always int directed(struct bpf_sock_addr *ctx, struct endpoint *to, bool connecting)
{
	u64 netns = netns_cookie(ctx);
	struct pod *pod = map_lookup(MAP(PODS), &netns);
	struct bpf_sock *sk = ctx->sk;
	int error;

	if (!pod)
		return 1;
	/* What a connection of this socket before left behind. */
	if (connecting && sk)
		storage_delete(MAP(UDP_SOCKETS), sk);
	if ((pod->flags & POD_PASSING) || ctx->protocol != IPPROTO_UDP || role_of_current() != ROLE_NONE)
		return 1;
	error = direct_datagrams(ctx, netns, pod, to, connecting);
	if (error) {
		set_retval(-error);
		return 0;
	}
	return 1;
}

inline_always int direct4(struct bpf_sock_addr *ctx, bool connecting)
{
	struct endpoint to = {};

	read4(ctx, &to);
	if (!directed(ctx, &to, connecting))
		return 0;
	write4(ctx, &to);
	return 1;
}

inline_always int direct6(struct bpf_sock_addr *ctx, bool connecting)
{
	struct endpoint to = {};

	read6(ctx, &to);
	if (!directed(ctx, &to, connecting))
		return 0;
	write6(ctx, &to);
	return 1;
}

inline_always void answer_as_dialled4(struct bpf_sock_addr *ctx)
{
	struct endpoint endpoint = {};

	read4(ctx, &endpoint);
	if (as_dialled(ctx, &endpoint))
		write4(ctx, &endpoint);
}

inline_always void answer_as_dialled6(struct bpf_sock_addr *ctx)
{
	struct endpoint endpoint = {};

	read6(ctx, &endpoint);
	if (as_dialled(ctx, &endpoint))
		write6(ctx, &endpoint);
}

#endif
