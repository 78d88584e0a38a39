/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What arrives in an enrolled pod's namespace and belongs to no connection yet: mostly SYNs, some of them repeated, and
 * with SYN cookies the first ACK. So nothing is consumed here, only judged.
 */
#include "lib/address.h"
#include "lib/helpers.h"
#include "lib/policy.h"
#include "lib/refusal.h"

#define IFINDEX_LOOPBACK 1

inline_always int to_listener(struct bpf_sk_lookup *ctx, struct tuple *tuple, u32 identity, u32 destination)
{
	struct endpoint key = {
		.address = tuple->server_address,
		.port = tuple->server_port,
		.protocol = IPPROTO_TCP,
	};
	void *listener = map_lookup(MAP(LISTENERS), &key);
	long error;

	if (!listener) {
		refuse_arrival(tuple, REASON_NO_LISTENER, identity, destination);
		return SK_DROP;
	}
	/* This socket and no other, whatever else the pod has bound to the port. */
	error = assign_socket(ctx, listener, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	release_socket(listener);
	return error ? SK_DROP : SK_PASS;
}

int sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct tuple tuple = {};
	struct peer *peer, *source;
	struct who *who;
	u32 identity = IDENTITY_PLAIN, kind = VIA_PLAIN, generation, reason;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		u32 remote_ip4 = ctx->remote_ip4, local_ip4 = ctx->local_ip4;

		KEEP(remote_ip4);
		KEEP(local_ip4);
		set_ipv4(&tuple.client_address, remote_ip4);
		set_ipv4(&tuple.server_address, local_ip4);
	} else {
		set_ipv6(&tuple.client_address, ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2],
			 ctx->remote_ip6[3]);
		set_ipv6(&tuple.server_address, ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2],
			 ctx->local_ip6[3]);
	}
	tuple.client_port = ctx->remote_port;
	tuple.server_port = bpf_htons((u16)ctx->local_port);
	if (is_loopback(&tuple.server_address) && ctx->ingress_ifindex == IFINDEX_LOOPBACK)
		return SK_PASS;

	peer = map_lookup(MAP(PEERS), &tuple.server_address);
	if (!peer || !(peer->flags & PEER_LOCAL) || !(peer->flags & PEER_ENROLLED)) {
		refuse_arrival(&tuple, REASON_UNKNOWN_DESTINATION, IDENTITY_PLAIN, 0);
		return SK_DROP;
	}
	who = map_lookup(MAP(CONNECTING), &tuple);
	if (who) {
		identity = who->identity;
		kind = who->kind;
		/* These never leave their own namespace. */
		if ((kind == VIA_TUNNEL || kind == VIA_SELF || kind == VIA_CAPTURED) &&
		    who->netns != peer->netns)
			kind = 0;
	}
	if (tuple.server_port == bpf_htons(PORT_HBONE))
		return to_listener(ctx, &tuple, identity, peer->identity);
	if (is_own_port(tuple.server_port)) {
		if (kind == VIA_CAPTURED)
			return to_listener(ctx, &tuple, identity, peer->identity);
		refuse_arrival(&tuple, REASON_NOT_CAPTURED, identity, peer->identity);
		return SK_DROP;
	}
	if (!who) {
		source = map_lookup(MAP(PEERS), &tuple.client_address);
		if (source && (source->flags & PEER_ENROLLED) && !(source->flags & PEER_JOINING)) {
			refuse_arrival(&tuple, REASON_SPOOFED, IDENTITY_PLAIN, peer->identity);
			return SK_DROP;
		}
	}
	if (kind == 0 || kind == VIA_CAPTURED) {
		refuse_arrival(&tuple, REASON_SPOOFED, identity, peer->identity);
		return SK_DROP;
	}
	reason =
		judge_via(kind, peer->netns, identity, &tuple.client_address, tuple.server_port, &generation);
	if (reason) {
		refuse_arrival(&tuple, reason, identity, peer->identity);
		return SK_DROP;
	}
	if (who)
		who->generation = generation;
	return SK_PASS;
}
