/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * As whom a pod may send: its own hardware address, ARP, neighbour advertisements and source, and nothing that a node would unpack
 * and believe. What is said here of a pod holds for others because its own veth drops the rest.
 */
#ifndef MYCEL_SENDER_H
#define MYCEL_SENDER_H

#include "lib/address.h"
#include "lib/helpers.h"
#include "lib/packet.h"

#define IPV4_BROADCAST 0xffffffff

struct arp {
	u8 fixed[6];
	__be16 operation;
	u8 sender_mac[6];
	u8 sender[4];
};

inline_always bool is_own_mac(struct __sk_buff *ctx, struct interface *interface)
{
	u8 mac[6];
	u8 difference = 0;

	if (skb_load_bytes(ctx, ETH_ALEN, mac, sizeof(mac)) < 0)
		return false;
	for (int i = 0; i < 6; i++)
		difference |= mac[i] ^ interface->mac[i];
	return difference == 0;
}

/* Whoever has no address yet asks all of its link for one. */
inline_always bool asks_for_lease(const struct packet *packet)
{
	const struct address *to = &packet->destination;

	return is_dhcp(packet, true) &&
	       (is_multicast(to) || (is_ipv4(to) && to->word[3] == bpf_htonl(IPV4_BROADCAST)));
}

/* The source's address: the pod's own, or one that whoever has none yet speaks from. */
inline_always bool is_own_source(struct interface *interface, struct packet *packet)
{
	const struct address *source = &packet->source;
	bool ipv4 = is_ipv4(source);
	const struct address *own = ipv4 ? &interface->address4 : &interface->address6;

	if (is_same_address(source, own) && !is_none(source))
		return true;
	if (ipv4) {
		if (source->word[3] == 0)
			return asks_for_lease(packet) || is_link_matter(packet);
	} else {
		if (is_link_local(source))
			return true;
		if (is_none(source))
			return is_link_matter(packet);
	}
	/* What addresses of this family it has is not known: whatever is nobody else's. */
	return is_none(own) && !map_lookup(MAP(PEERS), source);
}

/* An address by which nobody is known: others in the mesh could not tell that it is this pod who speaks. */
inline_always bool is_unnamed(const struct interface *interface, const struct address *source)
{
	return is_link_local(source) ||
	       is_none(is_ipv4(source) ? &interface->address4 : &interface->address6);
}

/* What another pod of this node sent by such an address: to all of its link, or to a link-local address. */
inline_always bool is_of_unnamed_pod(struct __sk_buff *ctx, const struct address *source)
{
	u32 index = ctx->ingress_ifindex;
	struct interface *sender = map_lookup(MAP(INTERFACES), &index);

	return sender && !(sender->flags & POD_PASSING) && is_unnamed(sender, source);
}

inline_always bool is_enrolled(const struct address *address)
{
	struct peer *peer = map_lookup(MAP(PEERS), address);

	return peer && (peer->flags & PEER_ENROLLED);
}

/*
 * What an overlay network's node would unpack, and believe the addresses in it: VXLAN (4789, or as Linux and flannel have it 8472)
 * and Geneve. Between two pods it is theirs.
 */
inline_always bool is_overlay(const struct packet *packet)
{
	__be16 port = packet->destination_port;

	if (packet->protocol != IPPROTO_UDP ||
	    (port != bpf_htons(4789) && port != bpf_htons(8472) && port != bpf_htons(6081)))
		return false;
	struct peer *peer = map_lookup(MAP(PEERS), &packet->destination);

	return !peer || (peer->flags & PEER_NODE);
}

/* ARP: its own address, or none yet (a probe, RFC 5227). */
inline_always bool is_own_arp(struct __sk_buff *ctx, struct interface *interface)
{
	struct arp arp;
	__be32 sender;

	if (skb_load_bytes(ctx, ETH_HLEN, &arp, sizeof(arp)) < 0)
		return false;
	__builtin_memcpy(&sender, arp.sender, 4);
	for (int i = 0; i < 6; i++) {
		if (arp.sender_mac[i] != interface->mac[i])
			return false;
	}
	if (sender == 0 || sender == interface->address4.word[3])
		return true;
	if (!is_none(&interface->address4))
		return false;
	struct address address;

	set_ipv4(&address, sender);
	return !map_lookup(MAP(PEERS), &address);
}

/* A neighbour advertisement names an address of the pod; a pod is no router (RFC 4861). */
inline_always bool is_own_link_matter(struct __sk_buff *ctx, struct interface *interface,
				      struct packet *packet)
{
	struct address target;

	if (packet->protocol != IPPROTO_ICMPV6)
		return true;
	if (packet->icmp_type == 134 || packet->icmp_type == 137)
		return false;
	if (packet->icmp_type != 136)
		return true;
	if (skb_load_bytes(ctx, packet->at + 8, &target, sizeof(target)) < 0)
		return false;
	return is_link_local(&target) || is_same_address(&target, &interface->address6) ||
	       (is_none(&interface->address6) && !map_lookup(MAP(PEERS), &target));
}

#endif
