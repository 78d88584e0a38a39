/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The host's end of a pod's veth, both ways. Sockets are judged at connect() and by sk_lookup; here is what those never see:
 * forged sources, raw and packet sockets, and all that is no TCP, which is judged where it arrives, by who has its source's address.
 * That an address is its sender's is certain because each pod's own veth drops others.
 *
 * Of established TCP nothing is asked but whether a socket sent it.
 */
#include "lib/account.h"
#include "lib/address.h"
#include "lib/helpers.h"
#include "lib/packet.h"
#include "lib/policy.h"
#include "lib/refusal.h"
#include "lib/sender.h"
#include "lib/talks.h"

/* TCX_NEXT and TCX_DROP, as TC_ACT_UNSPEC and TC_ACT_SHOT in a filter. */
#define NEXT (-1)
#define DROP 2

/* In the packet's control block, which is zero when it is made. */
#define SEEN 0x6d796365

#define SOCK_STREAM 1
#define STATE_NEW_SYN_RECV 12

static void *(*sk_fullsock)(void *sk) = (void *)BPF_FUNC_sk_fullsock;
static u64 (*skb_cgroup_id)(void *skb) = (void *)BPF_FUNC_skb_cgroup_id;

/* Who wrote it: a TCP socket of the pod (or its handshake), of which connect() and sk_lookup know, and nobody else. */
inline_always bool is_of_tcp_socket(struct __sk_buff *ctx)
{
	void *sk = ctx->sk, *full;

	if (!sk)
		return false;
	full = sk_fullsock(sk);
	if (!full)
		return LOAD(u32, sk, offsetof(struct bpf_sock, state)) == STATE_NEW_SYN_RECV;
	u32 family = LOAD(u32, full, offsetof(struct bpf_sock, family));

	return (family == AF_INET || family == AF_INET6) &&
	       LOAD(u32, full, offsetof(struct bpf_sock, type)) == SOCK_STREAM;
}

/* A dial of the node proxy's, as connect() wrote it down. */
inline_always bool is_tunnel(struct __sk_buff *ctx)
{
	void *sk = ctx->sk, *full;

	if (!sk)
		return false;
	full = sk_fullsock(sk);
	if (!full)
		return false;
	struct socket_state *state = storage_get(MAP(SOCKETS), full, 0, 0);

	return state && state->kind == VIA_TUNNEL;
}

inline_always u32 role_of_sender(struct __sk_buff *ctx)
{
	u64 cgroup = skb_cgroup_id(ctx);
	u32 *role = map_lookup(MAP(ROLES), &cgroup);

	return role ? *role : ROLE_NONE;
}

inline_always u32 identity_of(const struct address *address)
{
	struct peer *peer = map_lookup(MAP(PEERS), address);

	return peer && (peer->flags & PEER_ENROLLED) ? peer->identity : IDENTITY_PLAIN;
}

/* Whose flow that is. The key's ports are the pod's and the other end's, whoever sends. */
inline_always void flow_from(struct interface *interface, struct talk_key *key, u8 protocol, u32 direction,
			     u32 reason, struct flow_key *flow)
{
	struct peer *peer = map_lookup(MAP(PEERS), &key->peer_address);
	u32 other = peer ? peer->identity : IDENTITY_PLAIN;
	u16 zone = peer ? peer->zone : 0, own_zone = zone_of(&interface->address4);
	bool outbound = direction == DIRECTION_OUTBOUND;

	if (!own_zone)
		own_zone = zone_of(&interface->address6);
	flow->source = outbound ? interface->identity : other;
	flow->destination = outbound ? other : interface->identity;
	flow->source_zone = outbound ? own_zone : zone;
	flow->destination_zone = outbound ? zone : own_zone;
	flow->port = outbound ? key->peer_port : key->pod_port;
	if (is_icmp(protocol))
		flow->port = 0;
	flow->verdict = reason;
	flow->protocol = protocol;
	flow->direction = direction;
}

inline_always u32 datagrams_of(struct __sk_buff *ctx)
{
	u32 segments = ctx->gso_segs;

	return segments ? segments : 1;
}

/* The key of accounts is this one without a protocol. */
inline_always struct conversation_key *conversation_from(struct talk_key *key)
{
	key->protocol = 0;
	key->direction = 0;
	return (struct conversation_key *)key;
}

inline_always int refuse_packet(struct __sk_buff *ctx, struct interface *interface, struct packet *packet,
				struct talk_key *key, u32 direction, u32 reason)
{
	struct flow_key flow;

	flow_from(interface, key, packet->protocol, direction, reason, &flow);
	count(reason);
	account_refused_datagram(conversation_from(key), &flow, packet->payload, datagrams_of(ctx));
	return DROP;
}

/* What comes to a pod and is no TCP: by the identity behind its source's address, as a connection to that port. */
inline_always u32 judge_datagram(u64 netns, struct talk_key *key, u8 protocol, bool from_host)
{
	__be16 port = is_icmp(protocol) ? 0 : key->pod_port;
	u32 generation, reason;

	reason = judge(netns, identity_of(&key->peer_address), &key->peer_address, port, &generation);
	if (!reason && !from_host &&
	    !network_allows(netns, DIRECTION_INBOUND, &key->peer_address, protocol, port))
		reason = REASON_NETWORK_POLICY;
	return reason;
}

/* A handshake, or data of no TCP socket. */
inline_always u32 judge_tcp_from_pod(struct __sk_buff *ctx, struct interface *interface,
				     struct packet *packet, bool of_socket)
{
	bool syn = packet->flags & TCP_SYN, ack = packet->flags & TCP_ACK;
	struct peer *peer;
	struct who *who;
	u32 generation, kind = VIA_PLAIN, identity = IDENTITY_PLAIN;

	/* Resets, and acknowledgements of connections that have closed, come from the kernel itself. */
	if (!syn && !packet->payload)
		return 0;
	/* Of what arrives there nothing is judged. */
	if (syn && ack && (interface->flags & POD_OPEN))
		return 0;
	peer = map_lookup(MAP(PEERS), &packet->destination);
	bool enrolled = peer && (peer->flags & PEER_ENROLLED);

	if (syn && ack) {
		/* The server's end of a connection whose SYN sk_lookup may have refused. */
		struct tuple tuple = {
			.client_address = packet->destination,
			.server_address = packet->source,
			.client_port = packet->destination_port,
			.server_port = packet->source_port,
		};

		who = map_lookup(MAP(CONNECTING), &tuple);
		if (who) {
			kind = who->kind;
			identity = who->identity;
			if (kind != VIA_DIRECT && kind != VIA_PROBE)
				return REASON_SPOOFED;
		} else if (enrolled && !(peer->flags & PEER_JOINING)) {
			return REASON_SPOOFED;
		}
		if (is_own_port(packet->source_port))
			return REASON_NOT_CAPTURED;
		return judge_via(kind, interface->netns, identity, &packet->destination, packet->source_port,
				 &generation);
	}
	if (syn) {
		struct tuple tuple = {
			.client_address = packet->source,
			.server_address = packet->destination,
			.client_port = packet->source_port,
			.server_port = packet->destination_port,
		};

		/* Judged at connect(), and once more where it arrives. */
		who = map_lookup(MAP(CONNECTING), &tuple);
		if (who && who->netns == interface->netns && who->kind == VIA_DIRECT)
			return 0;
	}
	/* On this node sk_lookup refuses what nobody wrote down, so that the application hears of it at once. */
	if (syn && of_socket && enrolled && (peer->flags & (PEER_LOCAL | PEER_JOINING)))
		return 0;
	if (enrolled) {
		/* Between nodes the node proxy speaks, and nobody else. */
		if (syn && !(peer->flags & PEER_LOCAL) && packet->destination_port == bpf_htons(PORT_HBONE)) {
			if (is_tunnel(ctx))
				return 0;
		}
		return REASON_NOT_CAPTURED;
	}
	return network_allows(interface->netns, DIRECTION_OUTBOUND, &packet->destination, IPPROTO_TCP,
			      packet->destination_port) ?
		       0 :
		       REASON_NETWORK_POLICY;
}

/*
 * What a TCP socket of the pod sends after its handshake, by its own address: most of what passes, so it is seen with few looks.
 * Whatever is unusual about it is left to the parser. A socket may own what a tunnel made of its segment, so what the packet is
 * counts too.
 */
inline_always bool is_usual_tcp(struct __sk_buff *ctx, struct interface *interface, bool ipv6)
{
	u8 *at = (u8 *)(long)ctx->data, *end = (u8 *)(long)ctx->data_end;
	const struct address *own = ipv6 ? &interface->address6 : &interface->address4;
	u8 *tcp = at + ETH_HLEN + (ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));

	if (tcp + sizeof(struct transport) > end || is_none(own))
		return false;
	for (int i = 0; i < 6; i++) {
		if (at[ETH_ALEN + i] != interface->mac[i])
			return false;
	}
	if (ipv6) {
		struct ipv6hdr *ip = (void *)(at + ETH_HLEN);

		if (ip->version != 6 || ip->nexthdr != IPPROTO_TCP)
			return false;
		for (int i = 0; i < 4; i++) {
			if (ip->saddr.s6_addr32[i] != own->word[i])
				return false;
		}
	} else {
		struct iphdr *ip = (void *)(at + ETH_HLEN);

		if (at[ETH_HLEN] != 0x45 || ip->protocol != IPPROTO_TCP ||
		    (ip->frag_off & bpf_htons(0x3fff)) || ip->saddr != own->word[3])
			return false;
	}
	u8 flags = tcp[offsetof(struct transport, flags)];

	return (!(flags & TCP_SYN) || (flags & TCP_ACK)) && is_of_tcp_socket(ctx);
}

/* Whether this program has seen it here already: a link runs before a filter, and both may be there for a moment. */
inline_always bool is_seen_again(struct __sk_buff *ctx, struct interface *interface, bool from_pod)
{
	u32 mark = SEEN ^ (ctx->ifindex << 1 | from_pod);

	if (!(interface->flags & INTERFACE_FILTERS))
		return false;
	if (ctx->cb[4] == mark)
		return true;
	ctx->cb[4] = mark;
	return false;
}

inline_always void account_talk(struct __sk_buff *ctx, struct interface *interface, struct packet *packet,
				struct talk_key *key, u32 direction, bool from_pod)
{
	struct flow_key flow;

	if (packet->protocol != IPPROTO_UDP || is_seen_again(ctx, interface, from_pod))
		return;
	flow_from(interface, key, IPPROTO_UDP, direction, 0, &flow);
	account_datagram(conversation_from(key), &flow, from_pod, packet->payload, datagrams_of(ctx));
}

int from_pod(struct __sk_buff *ctx)
{
	u32 index = ctx->ifindex, protocol = ctx->protocol, reason = 0, direction = DIRECTION_OUTBOUND;
	struct interface *interface = map_lookup(MAP(INTERFACES), &index);
	struct packet packet = {};
	bool ipv6 = protocol == bpf_htons(ETH_P_IPV6);

	if (!interface)
		return DROP;
	if (protocol == bpf_htons(ETH_P_ARP)) {
		if (is_own_mac(ctx, interface) && is_own_arp(ctx, interface))
			return NEXT;
		count(REASON_SPOOFED);
		return DROP;
	}
	bool may_be_judged = (ipv6 || protocol == bpf_htons(ETH_P_IP)) && !ctx->vlan_present;

	if (may_be_judged && is_usual_tcp(ctx, interface, ipv6))
		return NEXT;
	/* What is no IP, or in a VLAN, cannot be judged. */
	if (!may_be_judged || !parse(ctx, ETH_HLEN, ipv6, false, &packet)) {
		count(REASON_SPOOFED);
		return DROP;
	}
	struct talk_key key = {
		.netns = interface->netns,
		.pod_address = packet.source,
		.peer_address = packet.destination,
		.pod_port = packet.source_port,
		.peer_port = packet.destination_port,
		.protocol = packet.protocol,
	};

	if (!is_own_mac(ctx, interface) || !is_own_source(interface, &packet) || is_tunnelled(&packet) ||
	    is_overlay(&packet))
		return refuse_packet(ctx, interface, &packet, &key, DIRECTION_OUTBOUND, REASON_SPOOFED);
	if (packet.protocol == IPPROTO_TCP) {
		bool of_socket = is_of_tcp_socket(ctx);

		if (of_socket && (!(packet.flags & TCP_SYN) || (packet.flags & TCP_ACK)))
			return NEXT;
		if (interface->flags & POD_PASSING)
			return NEXT;
		reason = packet.fragment & FRAGMENT_LATER ?
				 REASON_NOT_CAPTURED :
				 judge_tcp_from_pod(ctx, interface, &packet, of_socket);
		if (reason)
			return refuse_packet(ctx, interface, &packet, &key, DIRECTION_OUTBOUND, reason);
		return NEXT;
	}
	if (is_link_matter(&packet)) {
		if (is_own_link_matter(ctx, interface, &packet))
			return NEXT;
		return refuse_packet(ctx, interface, &packet, &key, DIRECTION_OUTBOUND, REASON_SPOOFED);
	}
	if (asks_for_lease(&packet)) {
		note_lease_request(interface->netns, &packet);
		return NEXT;
	}
	bool passing = interface->flags & POD_PASSING;

	if (packet.fragment & FRAGMENT_LATER) {
		if (passing || is_of_passed_datagram(&key, &packet, DIRECTION_OUTBOUND))
			return NEXT;
		return DROP;
	}
	if (is_icmp_error(&packet)) {
		u32 whom = whom_it_is_about(ctx, &packet, &key, true);

		if (whom == ABOUT_NOBODY)
			return refuse_packet(ctx, interface, &packet, &key, direction, REASON_SPOOFED);
		if (whom == ABOUT_OURS)
			return NEXT;
	}
	struct talk *talk = is_icmp_request(&packet) ? 0 : fresh_talk(&key);

	if (talk && talk->direction == DIRECTION_INBOUND) {
		/* An answer: as allowed as what it answers is now. */
		direction = DIRECTION_INBOUND;
		if (!(interface->flags & POD_OPEN) && !(talk->flags & TALK_EXEMPT))
			reason = judge_datagram(interface->netns, &key, packet.protocol,
						talk->flags & TALK_FROM_HOST);
	} else if (!passing && is_unnamed(interface, &packet.source) && is_enrolled(&packet.destination)) {
		reason = REASON_NO_ADDRESS;
	} else if (!passing &&
		   !network_allows(interface->netns, DIRECTION_OUTBOUND, &packet.destination, packet.protocol,
				   is_icmp(packet.protocol) ? 0 : packet.destination_port)) {
		reason = REASON_NETWORK_POLICY;
	}
	if (reason)
		return refuse_packet(ctx, interface, &packet, &key, direction, reason);
	if (talk) {
		talk->used = now_ns();
	} else {
		struct talk begins = { .used = now_ns(), .direction = DIRECTION_OUTBOUND };

		map_update(MAP(TALKS), &key, &begins, BPF_ANY);
	}
	account_talk(ctx, interface, &packet, &key, direction, true);
	note_fragments(&key, &packet, DIRECTION_OUTBOUND);
	return NEXT;
}

int to_pod(struct __sk_buff *ctx)
{
	u32 index = ctx->ifindex, protocol = ctx->protocol, reason = 0, direction = DIRECTION_INBOUND;
	struct packet packet = {};
	struct interface *interface;
	bool ipv6 = protocol == bpf_htons(ETH_P_IPV6);
	u8 next = 0;

	if (!ipv6 && protocol != bpf_htons(ETH_P_IP))
		return NEXT;
	/* TCP is sk_lookup's, and its sockets'. */
	if (skb_load_bytes(
		    ctx,
		    ETH_HLEN + (ipv6 ? offsetof(struct ipv6hdr, nexthdr) : offsetof(struct iphdr, protocol)),
		    &next, 1) == 0 &&
	    next == IPPROTO_TCP)
		return NEXT;
	interface = map_lookup(MAP(INTERFACES), &index);
	if (!interface)
		return DROP;
	if (interface->flags & POD_OPEN)
		return NEXT;
	if (!parse(ctx, ETH_HLEN, ipv6, false, &packet)) {
		count(REASON_POLICY);
		return DROP;
	}
	if (packet.protocol == IPPROTO_TCP || is_link_matter(&packet) || is_lease(interface->netns, &packet))
		return NEXT;
	/* Not forwarded: from the node itself. */
	bool from_host = ctx->ingress_ifindex == 0;
	u32 flags = from_host ? TALK_FROM_HOST : 0;
	struct talk_key key = {
		.netns = interface->netns,
		.pod_address = packet.destination,
		.peer_address = packet.source,
		.pod_port = packet.destination_port,
		.peer_port = packet.source_port,
		.protocol = packet.protocol,
	};

	if (packet.fragment & FRAGMENT_LATER)
		return is_of_passed_datagram(&key, &packet, DIRECTION_INBOUND) ? NEXT : DROP;
	if (is_icmp_error(&packet) && whom_it_is_about(ctx, &packet, &key, false) == ABOUT_OURS)
		return NEXT;
	struct talk *talk = is_icmp_request(&packet) ? 0 : fresh_talk(&key);

	if (talk && talk->direction == DIRECTION_OUTBOUND) {
		direction = DIRECTION_OUTBOUND;
		if (!network_allows(interface->netns, DIRECTION_OUTBOUND, &packet.source, packet.protocol,
				    is_icmp(packet.protocol) ? 0 : packet.source_port))
			reason = REASON_NETWORK_POLICY;
	} else if (from_host && (is_icmp(packet.protocol) || role_of_sender(ctx) == ROLE_PROBER)) {
		/* The node looks whether its pod lives. */
		flags |= TALK_EXEMPT;
	} else if (is_of_unnamed_pod(ctx, &packet.source)) {
		reason = REASON_NO_ADDRESS;
	} else {
		reason = judge_datagram(interface->netns, &key, packet.protocol, from_host);
	}
	if (reason)
		return refuse_packet(ctx, interface, &packet, &key, direction, reason);
	if (talk) {
		talk->used = now_ns();
	} else {
		struct talk begins = { .used = now_ns(), .direction = DIRECTION_INBOUND, .flags = flags };

		map_update(MAP(TALKS), &key, &begins, BPF_ANY);
	}
	account_talk(ctx, interface, &packet, &key, direction, false);
	note_fragments(&key, &packet, DIRECTION_INBOUND);
	return NEXT;
}
