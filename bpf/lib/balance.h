/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which service an address is, and which of its backends a client gets.
 *
 * The agent changes services under running programs. Few backends are one element with their service, and the kernel gives the
 * element of the time before to another service at once: what was read from it counts only while its name is still the same. Of
 * many backends a slot always holds one that is the service's before or after the change, and a slot that has gone makes the
 * program ask for the service again.
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

/* The id and the generation, of which no two values of the map have the same. */
union service_name {
	u64 whole;
	struct {
		u32 id;
		u32 generation;
	};
};

/* What was read of the service before is read before this. */
inline_always u64 name_of(struct service *service)
{
	u64 word = 0, order = __sync_fetch_and_add(&word, 1);

	return *(volatile u64 *)service + order;
}

inline_always struct backend *backend_at(union service_name name, u32 slot)
{
	struct backend_key key = { .service = name.id, .generation = name.generation, .slot = slot };

	return map_lookup(MAP(BACKENDS), &key);
}

inline_always bool draw_of_many(union service_name name, u32 count, struct endpoint *drawn)
{
	struct backend *backend = backend_at(name, random_u32() % count);

	/* A slot is its own backend's for a share of the draws, and another's for the rest (an alias table). */
	if (backend && backend->share != SHARE_WHOLE && random_u32() >= backend->share)
		backend = backend_at(name, backend->other);
	if (backend)
		*drawn = backend->endpoint;
	return backend;
}

/* A backend of the service, drawn at random by weight; false when there is none. */
inline_always bool draw(struct endpoint *key, struct service *service, struct endpoint *drawn)
{
	/* Meanwhile the service's backends may change: then it is asked again. */
	for (int attempt = 0; attempt < DRAWS; attempt++) {
		union service_name name = { .whole = name_of(service) };
		u32 count = service->count;

		if (count && !(service->flags & SERVICE_FEW)) {
			if (draw_of_many(name, count, drawn))
				return true;
		} else {
			u32 slot = count ? random_u32() % count : FEW_BACKENDS;

			if (slot < FEW_BACKENDS)
				*drawn = service->few[slot];
			if (name_of(service) == name.whole)
				return slot < FEW_BACKENDS;
		}
		service = map_lookup(MAP(SERVICES), key);
		if (!service)
			return false;
	}
	return false;
}

inline_always bool same_endpoint(const struct endpoint *one, const struct endpoint *other)
{
	return is_same_address(&one->address, &other->address) && one->port == other->port;
}

inline_always bool is_member(struct service *service, const struct endpoint *endpoint)
{
	if (service->flags & SERVICE_FEW) {
		for (u32 slot = 0; slot < FEW_BACKENDS && slot < service->count; slot++) {
			if (same_endpoint(&service->few[slot], endpoint))
				return true;
		}
		return false;
	}

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
