/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which service an address is, and which of its backends a client gets.
 *
 * The agent changes services under running programs, and the kernel may give what was replaced to another service at once. What is
 * read of a service and of a backend proves itself by a check word over it and over the service's key, in whatever order others
 * write it meanwhile; what does not is read again. Of many backends a slot always holds one that is the service's before or after
 * the change.
 */
#ifndef MYCEL_BALANCE_H
#define MYCEL_BALANCE_H

#include "lib/address.h"
#include "lib/helpers.h"
#include "lib/refusal.h"

/* What a service was found to be. A backend in its element proves itself when it is read. */
struct found {
	struct service *element;
	u32 id;
	u32 generation;
	u32 count;
	u32 flags;
};

inline_always u32 check_word(u32 sum, u32 word)
{
	sum = (sum ^ word) * CHECK_PRIME;
	/* Products carry upwards only, and what differs within a network of IPv4 is above already. */
	return sum ^ sum >> CHECK_FOLD;
}

inline_always u32 check_endpoint(u32 sum, const struct endpoint *endpoint)
{
	sum = check_word(sum, endpoint->address.word[0]);
	sum = check_word(sum, endpoint->address.word[1]);
	sum = check_word(sum, endpoint->address.word[2]);
	sum = check_word(sum, endpoint->address.word[3]);
	return check_word(sum, (u32)endpoint->protocol << 16 | endpoint->port);
}

inline_always u32 check_of_backend(const struct endpoint *key, const struct endpoint *backend)
{
	return check_endpoint(check_endpoint(CHECK_SEED, key), backend);
}

#define SERVICE_NONE 0
#define SERVICE_PROVEN 1
#define SERVICE_TORN 2

/* What is found is known only where it is proven. */
inline_always u32 read_service(const struct endpoint *key, struct found *found)
{
	struct service *service = map_lookup(MAP(SERVICES), key);
	u32 check = check_endpoint(CHECK_SEED, key);

	if (!service)
		return SERVICE_NONE;
	found->element = service;
	found->id = service->id;
	found->generation = service->generation;
	found->count = service->count;
	found->flags = service->flags;
	BARRIER();
	check = check_word(check_word(check, found->id), found->generation);
	check = check_word(check_word(check, found->count), found->flags);
	return check == service->check ? SERVICE_PROVEN : SERVICE_TORN;
}

inline_always bool find_service(const struct endpoint *key, struct found *found)
{
	NO_UNROLL
	for (int attempt = 0; attempt < DRAWS; attempt++) {
		u32 read = read_service(key, found);

		if (read != SERVICE_TORN)
			return read;
	}
	/* There is one, and nothing of it is certain: nobody is let past it. */
	found->count = 0;
	found->flags = 0;
	return true;
}

/*
 * The service of a node port, which stand once, under no address, for those of all nodes: peer is who has the dialled one.
 * Where there is one, the key becomes its.
 */
inline_always bool find_node_port(struct endpoint *key, struct peer *peer, struct found *found)
{
	struct address said = key->address;

	if (!peer || !(peer->flags & PEER_NODE))
		return false;
	/* ::ffff:0.0.0.0 or ::, so that each family has its own backends. */
	if (is_ipv4(&key->address))
		set_ipv4(&key->address, 0);
	else
		set_ipv6(&key->address, 0, 0, 0, 0);
	if (find_service(key, found))
		return true;
	key->address = said;
	return false;
}

inline_always struct backend *backend_at(struct found *service, u32 slot)
{
	struct backend_key key = { .service = service->id, .generation = service->generation, .slot = slot };

	return map_lookup(MAP(BACKENDS), &key);
}

/* The check that stands beside the backend in a slot; 0 when there is none. */
inline_always u32 *read_slot(struct found *service, u32 slot, struct endpoint *drawn)
{
	if (service->flags & SERVICE_FEW) {
		if (slot >= FEW_BACKENDS)
			return 0;
		struct few_backend *few = &service->element->few[slot];

		*drawn = few->endpoint;
		return &few->check;
	}
	struct backend *backend = backend_at(service, slot);

	/* A slot is its own backend's for a share of the draws, and another's for the rest (an alias table). */
	if (backend && backend->share != SHARE_WHOLE && random_u32() >= backend->share)
		backend = backend_at(service, backend->other);
	if (!backend)
		return 0;
	*drawn = backend->endpoint;
	return &backend->check;
}

/* A backend of the service, drawn at random by weight; false when there is none. */
inline_always bool draw(struct endpoint *key, struct found *service, struct endpoint *drawn)
{
	/* Meanwhile the service may change: then it is asked again. */
	NO_UNROLL
	for (int attempt = 0; attempt < DRAWS; attempt++) {
		if (service->count == 0)
			return false;
		u32 *check = read_slot(service, random_u32() % service->count, drawn);

		if (check) {
			BARRIER();
			if (*check == check_of_backend(key, drawn))
				return true;
		}
		if (read_service(key, service) != SERVICE_PROVEN)
			return false;
	}
	return false;
}

inline_always bool same_endpoint(const struct endpoint *one, const struct endpoint *other)
{
	return is_same_address(&one->address, &other->address) && one->port == other->port;
}

inline_always bool is_among_few(struct service *service, u32 check, const struct endpoint *endpoint)
{
	NO_UNROLL
	for (u32 slot = 0; slot < FEW_BACKENDS; slot++) {
		if (service->few[slot].check == check &&
		    same_endpoint(&service->few[slot].endpoint, endpoint))
			return true;
	}
	return false;
}

inline_always bool is_member(const struct endpoint *key, struct found *service,
			     const struct endpoint *endpoint)
{
	u32 check = check_of_backend(key, endpoint);

	if (service->flags & SERVICE_FEW)
		return is_among_few(service->element, check, endpoint);

	struct member_key member = {
		.service = service->id,
		.generation = service->generation,
		.endpoint = *endpoint,
	};
	u32 *written = map_lookup(MAP(MEMBERS), &member);

	return written && *written == check;
}

/* The backend that the client had last, if it still is one and the time is not over. */
inline_always bool keeps(u64 netns, const struct endpoint *service_key, struct found *service,
			 struct endpoint *kept)
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
	BARRIER();
	if (!is_member(service_key, service, kept))
		return false;
	last->used = now;
	return true;
}

inline_always void keep(u64 netns, struct found *service, struct endpoint *drawn)
{
	struct affinity_key key = { .netns = netns, .service = service->id };
	struct affinity value = { .endpoint = *drawn, .used = now_ns() };

	map_update(MAP(AFFINITY), &key, &value, BPF_ANY);
}

/* Where a connection to the service goes; false when nowhere. */
inline_always bool choose(u64 netns, struct endpoint *key, struct found *service, struct endpoint *chosen)
{
	bool affinity = service->flags & SERVICE_AFFINITY;

	if (affinity && keeps(netns, key, service, chosen))
		return true;
	if (!draw(key, service, chosen))
		return false;
	if (affinity)
		keep(netns, service, chosen);
	return true;
}

#endif
