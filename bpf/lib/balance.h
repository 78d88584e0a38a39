/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which service an address is, and which of its backends a client gets.
 *
 * The agent changes a service's slots under running programs: a slot always holds a backend that is one of the service's
 * before or after the change, and a slot that has gone makes the program ask for the service again.
 */
#ifndef MYCEL_BALANCE_H
#define MYCEL_BALANCE_H

#include "lib/address.h"
#include "lib/helpers.h"
#include "lib/refusal.h"

/*
 * The service of a node port, which stand once, under no address, for those of all nodes: peer is who has the dialled one.
 * Where there is one, the key becomes its.
 */
inline_always struct service *node_port_at(struct endpoint *key, struct peer *peer)
{
	struct address said = key->address;
	struct service *service;

	if (!peer || !(peer->flags & PEER_NODE))
		return 0;
	/* ::ffff:0.0.0.0 or ::, so that each family has its own backends. */
	if (is_ipv4(&key->address))
		set_ipv4(&key->address, 0);
	else
		set_ipv6(&key->address, 0, 0, 0, 0);
	service = map_lookup(MAP(SERVICES), key);
	if (!service)
		key->address = said;
	return service;
}

inline_always struct backend *backend_at(struct service *service, u32 slot)
{
	struct backend_key key = { .service = service->id, .generation = service->generation, .slot = slot };

	return map_lookup(MAP(BACKENDS), &key);
}

/* A backend of the service, drawn at random by weight; false when there is none. */
inline_always bool draw(struct endpoint *key, struct service *service, struct endpoint *drawn)
{
	struct service now = *service;

	/* Between the lookups the service's backends may change: then it is asked again, once. */
	for (int attempt = 0; attempt < 2; attempt++) {
		if (now.count == 0)
			return false;
		struct backend *backend = backend_at(&now, random_u32() % now.count);

		/* A slot is its own backend's for a share of the draws, and another's for the rest (an alias table). */
		if (backend && backend->share != SHARE_WHOLE && random_u32() >= backend->share)
			backend = backend_at(&now, backend->other);
		if (backend) {
			*drawn = backend->endpoint;
			return true;
		}
		service = map_lookup(MAP(SERVICES), key);
		if (!service)
			return false;
		now = *service;
	}
	return false;
}

inline_always bool is_member(struct service *service, const struct endpoint *endpoint)
{
	struct member_key member = {
		.service = service->id,
		.generation = service->generation,
		.endpoint = *endpoint,
	};

	return map_lookup(MAP(MEMBERS), &member) != 0;
}

/* The backend that the client had last, if it still is one and the time is not over. */
inline_always bool keeps(u64 netns, struct service *service, struct endpoint *kept)
{
	struct affinity_key key = { .netns = netns, .service = service->id };
	struct affinity *last = map_lookup(MAP(AFFINITY), &key);
	u64 timeout = (u64)(service->flags >> SERVICE_AFFINITY_SHIFT) * SECOND_NS;

	if (!last)
		return false;
	/* Before the clock: another processor's dial of this moment is never later than ours. */
	u64 used = *(volatile u64 *)&last->used;
	u64 now = now_ns();

	if (now - used >= timeout)
		return false;
	*kept = last->endpoint;
	if (!is_member(service, kept))
		return false;
	last->used = now;
	return true;
}

inline_always void keep(u64 netns, struct service *service, struct endpoint *drawn)
{
	struct affinity_key key = { .netns = netns, .service = service->id };
	struct affinity value = { .endpoint = *drawn, .used = now_ns() };

	map_update(MAP(AFFINITY), &key, &value, BPF_ANY);
}

/* Where a connection to the service goes; false when nowhere. */
inline_always bool choose(u64 netns, struct endpoint *key, struct service *service, struct endpoint *chosen)
{
	if (!(service->flags & SERVICE_AFFINITY))
		return draw(key, service, chosen);
	if (keeps(netns, service, chosen))
		return true;
	if (!draw(key, service, chosen))
		return false;
	keep(netns, service, chosen);
	return true;
}

#endif
