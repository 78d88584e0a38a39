/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Who began to speak, of all that is no TCP (map talks): what answers, is a later fragment, a lease that was asked for or an error
 * is as allowed as what it belongs to.
 */
#ifndef MYCEL_TALKS_H
#define MYCEL_TALKS_H

#include "lib/address.h"
#include "lib/helpers.h"
#include "lib/packet.h"
#include "lib/refusal.h"
#include "lib/sender.h"

/* As long as connection tracking keeps a stream of datagrams (net.netfilter.nf_conntrack_udp_timeout_stream), and more. */
#define TALK_NS (180 * SECOND_NS)

inline_always struct talk *fresh_talk(struct talk_key *key)
{
	struct talk *talk = map_lookup(MAP(TALKS), key);

	if (!talk)
		return 0;
	/* Before the clock, as another processor may write it at this moment. */
	u64 used = *(volatile u64 *)&talk->used;

	return now_ns() - used < TALK_NS ? talk : 0;
}

/* A later fragment goes the way of its first one, which comes before it: another is dropped. */
inline_always bool is_of_passed_datagram(struct talk_key *key, struct packet *packet, u32 direction)
{
	key->pod_port = packet->identification;
	key->peer_port = packet->identification;
	key->protocol = packet->protocol | TALK_FRAGMENTS;
	key->direction = direction;
	return fresh_talk(key);
}

inline_always void note_fragments(struct talk_key *key, struct packet *packet, u32 direction)
{
	struct talk talk = { .used = now_ns(), .direction = direction };

	if (!(packet->fragment & FRAGMENT_MORE))
		return;
	key->pod_port = packet->identification;
	key->peer_port = packet->identification;
	key->protocol = packet->protocol | TALK_FRAGMENTS;
	key->direction = direction;
	map_update(MAP(TALKS), key, &talk, BPF_ANY);
}

/* A server of leases is known by nobody's address; only who has just asked is answered. */
inline_always void key_of_lease(struct talk_key *key, u64 netns, __be16 client_port, __be16 server_port)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->netns = netns;
	key->pod_port = client_port;
	key->peer_port = server_port;
	key->protocol = IPPROTO_UDP;
}

inline_always void note_lease_request(u64 netns, const struct packet *packet)
{
	struct talk talk = { .used = now_ns(), .direction = DIRECTION_OUTBOUND };
	struct talk_key key;

	key_of_lease(&key, netns, packet->source_port, packet->destination_port);
	map_update(MAP(TALKS), &key, &talk, BPF_ANY);
}

inline_always bool is_lease(u64 netns, const struct packet *packet)
{
	struct talk_key key;

	if (!is_dhcp(packet, false) || is_enrolled(&packet->source))
		return false;
	key_of_lease(&key, netns, packet->destination_port, packet->source_port);
	return fresh_talk(&key);
}

#define ABOUT_NOBODY 0 /* not what this end could be told, or tell */
#define ABOUT_UNKNOWN 1
#define ABOUT_OURS 2 /* allowed where that was */

/*
 * Whether an ICMP error is about something that the pod sent; from the pod, that whom it tells sent to the pod, or else it would
 * speak for its neighbours. A TCP connection's is known by its addresses alone, the kernel compares its sequence numbers.
 */
inline_always u32 whom_it_is_about(struct __sk_buff *ctx, struct packet *packet, struct talk_key *key,
				   bool from_pod)
{
	struct packet about;
	bool ipv6 = packet->protocol == IPPROTO_ICMPV6;

	if (!parse(ctx, packet->at + 8, ipv6, true, &about))
		return ABOUT_NOBODY;
	const struct address *ours = from_pod ? &about.destination : &about.source;

	if (!is_same_address(ours, &key->pod_address))
		return ABOUT_NOBODY;
	if (from_pod && !is_same_address(&about.source, &key->peer_address))
		return ABOUT_NOBODY;
	if (about.protocol == IPPROTO_TCP)
		return from_pod ? ABOUT_UNKNOWN : ABOUT_OURS;
	struct talk_key said = {
		.netns = key->netns,
		.pod_address = *ours,
		.peer_address = from_pod ? about.source : about.destination,
		.pod_port = from_pod ? about.destination_port : about.source_port,
		.peer_port = from_pod ? about.source_port : about.destination_port,
		.protocol = about.protocol,
	};

	return fresh_talk(&said) ? ABOUT_OURS : ABOUT_UNKNOWN;
}

#endif
