/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What a packet says of itself, as far as verdicts hang on it. Nothing here is believed: only read. */
#ifndef MYCEL_PACKET_H
#define MYCEL_PACKET_H

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include "lib/address.h"
#include "lib/helpers.h"

static long (*skb_load_bytes)(void *skb, u32 offset, void *to, u32 size) = (void *)BPF_FUNC_skb_load_bytes;

#define TCP_SYN 2
#define TCP_ACK 16
#define EXTENSIONS 5 /* of IPv6, in a row; more are refused */
#define FRAGMENT_LATER 1
#define FRAGMENT_MORE 2

/* The first bytes of TCP, UDP and ICMP. */
struct transport {
	__be16 source_port; /* ICMP: type and code */
	__be16 destination_port;
	__be16 length; /* UDP; ICMP: the identifier of an echo */
	__be16 word3;
	__be32 acknowledged;
	u8 offset; /* TCP, in the upper half */
	u8 flags;
};

struct packet {
	struct address source;
	struct address destination;
	__be16 source_port; /* 0 where the protocol has none; of an echo its identifier in both */
	__be16 destination_port;
	__be16 identification; /* of fragments */
	u8 protocol;
	u8 fragment;
	u8 flags;     /* TCP */
	u8 icmp_type; /* ICMP of either version */
	u8 hops;      /* that it may go on for: TTL, hop limit */
	u8 pad;
	u32 at;	     /* where the transport's header begins */
	u32 payload; /* bytes behind it; ICMP: not told */
};

inline_always bool is_link_local(const struct address *address)
{
	return (address->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

inline_always bool has_ports(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	       protocol == IPPROTO_UDPLITE || protocol == IPPROTO_DCCP;
}

inline_always bool is_icmp(u8 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

inline_always bool is_multicast(const struct address *address)
{
	if (is_ipv4(address))
		return (address->word[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000);
	return (address->word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/*
 * Neighbour discovery and multicast listeners (RFC 4861, 2710, 3810; 3376), as they stay on their link: what a router has passed
 * on, or what is for one host and not for those that listen, is like any other packet.
 */
inline_always bool is_link_matter(const struct packet *packet)
{
	u8 type = packet->icmp_type;

	if (packet->protocol == IPPROTO_IGMP)
		return is_multicast(&packet->destination);
	if (packet->protocol != IPPROTO_ICMPV6)
		return false;
	if (type >= 133 && type <= 137)
		return packet->hops == 255;
	return ((type >= 130 && type <= 132) || type == 143) && is_multicast(&packet->destination);
}

/* An IP packet in another, which who takes it out would believe. */
inline_always bool is_tunnelled(const struct packet *packet)
{
	u8 protocol = packet->protocol;

	return protocol == IPPROTO_IPIP || protocol == IPPROTO_IPV6 || protocol == IPPROTO_GRE ||
	       protocol == IPPROTO_MPLS;
}

inline_always bool is_icmp_error(const struct packet *packet)
{
	u8 type = packet->icmp_type;

	if (packet->protocol == IPPROTO_ICMP)
		return type == 3 || type == 4 || type == 11 || type == 12;
	return packet->protocol == IPPROTO_ICMPV6 && type >= 1 && type <= 4;
}

/* It begins something, whatever was said before. */
inline_always bool is_icmp_request(const struct packet *packet)
{
	u8 type = packet->icmp_type;

	if (packet->protocol == IPPROTO_ICMP)
		return type != 0 && type != 14;
	return packet->protocol == IPPROTO_ICMPV6 && type != 129;
}

inline_always bool is_dhcp(const struct packet *packet, bool from_client)
{
	__be16 client4 = bpf_htons(68), server4 = bpf_htons(67), client6 = bpf_htons(546),
	       server6 = bpf_htons(547);
	__be16 from = packet->source_port, to = packet->destination_port;

	if (packet->protocol != IPPROTO_UDP || (packet->fragment & FRAGMENT_LATER))
		return false;
	return from_client ? (from == client4 && to == server4) || (from == client6 && to == server6) :
			     (from == server4 && to == client4) || (from == server6 && to == client6);
}

inline_always bool parse_ipv4(struct __sk_buff *ctx, u32 at, struct packet *packet, u32 *size)
{
	struct iphdr ip;

	if (skb_load_bytes(ctx, at, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5)
		return false;
	u32 header = ip.ihl * 4, total = bpf_ntohs(ip.tot_len), fragment = bpf_ntohs(ip.frag_off);

	set_ipv4(&packet->source, ip.saddr);
	set_ipv4(&packet->destination, ip.daddr);
	packet->protocol = ip.protocol;
	packet->hops = ip.ttl;
	packet->identification = ip.id;
	packet->fragment = (fragment & 0x1fff ? FRAGMENT_LATER : 0) | (fragment & 0x2000 ? FRAGMENT_MORE : 0);
	packet->at = at + header;
	/* Of what is larger than it can say (segmentation offload) it says nothing. */
	*size = total > header ? total - header : ctx->len - at - header;
	return true;
}

inline_always bool parse_ipv6(struct __sk_buff *ctx, u32 at, struct packet *packet, u32 *size)
{
	struct ipv6hdr ip;
	u32 begin = at + sizeof(ip);
	u8 next;

	if (skb_load_bytes(ctx, at, &ip, sizeof(ip)) < 0 || ip.version != 6)
		return false;
	set_ipv6(&packet->source, ip.saddr.s6_addr32[0], ip.saddr.s6_addr32[1], ip.saddr.s6_addr32[2],
		 ip.saddr.s6_addr32[3]);
	set_ipv6(&packet->destination, ip.daddr.s6_addr32[0], ip.daddr.s6_addr32[1], ip.daddr.s6_addr32[2],
		 ip.daddr.s6_addr32[3]);
	next = ip.nexthdr;
	packet->hops = ip.hop_limit;
	at = begin;
#pragma unroll
	for (int i = 0; i < EXTENSIONS; i++) {
		u8 extension[8];

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
			break;
		if (packet->fragment & FRAGMENT_LATER)
			break;
		if (skb_load_bytes(ctx, at, extension, sizeof(extension)) < 0)
			return false;
		if (next == IPPROTO_FRAGMENT) {
			u32 offset = extension[2] << 8 | extension[3];

			packet->fragment =
				(offset & 0xfff8 ? FRAGMENT_LATER : 0) | (offset & 1 ? FRAGMENT_MORE : 0);
			packet->identification = extension[6] << 8 | extension[7];
			at += 8;
		} else if (next == IPPROTO_AH) {
			at += (extension[1] + 2) * 4;
		} else {
			at += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}
	if (!(packet->fragment & FRAGMENT_LATER) &&
	    (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	     next == IPPROTO_FRAGMENT || next == IPPROTO_AH))
		return false;
	packet->protocol = next;
	packet->at = at;
	u32 length = bpf_ntohs(ip.payload_len);

	*size = length > at - begin ? length - (at - begin) : ctx->len - at;
	return true;
}

/*
 * An IP packet that begins there; false when it is none that could be judged. Of one that is quoted in an error no more than the
 * first eight bytes of its transport need be there (RFC 792).
 */
inline_always bool parse(struct __sk_buff *ctx, u32 at, bool ipv6, bool quoted, struct packet *packet)
{
	struct transport transport = {};
	u32 size = 0, header;

	packet->fragment = 0;
	packet->source_port = 0;
	packet->destination_port = 0;
	packet->flags = 0;
	packet->icmp_type = 255;
	packet->payload = 0;
	if (ipv6 ? !parse_ipv6(ctx, at, packet, &size) : !parse_ipv4(ctx, at, packet, &size))
		return false;
	if (packet->fragment & FRAGMENT_LATER)
		return true;
	if (packet->protocol == IPPROTO_TCP && !quoted) {
		if (skb_load_bytes(ctx, packet->at, &transport, 14) < 0)
			return false;
		packet->flags = transport.flags;
		header = (transport.offset >> 4) * 4;
	} else if (has_ports(packet->protocol) || is_icmp(packet->protocol)) {
		if (skb_load_bytes(ctx, packet->at, &transport, 8) < 0)
			return false;
		header = 8;
	} else {
		return true;
	}
	if (is_icmp(packet->protocol)) {
		packet->icmp_type = *(u8 *)&transport.source_port;
		/* The identifier of an echo. */
		packet->source_port = transport.length;
		packet->destination_port = transport.length;
		return true;
	}
	packet->source_port = transport.source_port;
	packet->destination_port = transport.destination_port;
	/* The first fragment of a datagram says how long all of it is. */
	if (packet->protocol == IPPROTO_UDP && transport.length)
		size = bpf_ntohs(transport.length);
	packet->payload = size > header ? size - header : 0;
	return true;
}

#endif
