/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two ends that check every byte that they exchange.
 *
 *   streams serve ADDRESS PORT THREADS SEED FLAGS
 *   streams dial  ADDRESS PORT THREADS SEED FLAGS CONNECTIONS
 *
 * Each byte of a stream follows from the connection (seed, client's port), the direction and its offset, and so does what the two
 * ends do: who speaks first, sizes of writes and reads, what they wait with, when and how they close. So both ends know what has to
 * come, and nothing has to be told. FLAGS: 1 some clients reset; 2 IPv6 sockets (IPv4-mapped addresses); 4 long-lived: more rounds.
 * Prints one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

#define RESETS 1
#define MAPPED 2
#define LONG 4
#define LARGEST (1 << 20)
#define PATIENCE_MS 30000

enum wait {
	POLL,
	SELECT,
	EPOLL_LEVEL,
	EPOLL_EDGE,
	DONTWAIT
};
enum end {
	HALF_CLOSE,
	CLIENT_FIRST,
	SERVER_FIRST,
	RESET
};

struct plan {
	uint64_t seed;
	uint64_t total[2]; /* bytes after the rounds, of the client and of the server */
	unsigned rounds;
	enum wait wait[2];
	unsigned largest_read[2], largest_write[2];
	unsigned slow_us[2];
	enum end end;
	uint64_t reset_after;
};

struct stream {
	int fd, epoll, side;
	enum wait wait;
	uint64_t random, seed[2];
	uint64_t sent, read; /* so far */
	bool nodelay, peer_closed;
	unsigned char *buffer;
	const char *problem;
};

static int flags;
static uint64_t run_seed;
static struct sockaddr_storage address;
static socklen_t address_length;
static uint64_t good, bad, total_sent, total_read, resets, left;
static int listener;

static uint64_t mix(uint64_t z)
{
	z += 0x9e3779b97f4a7c15ULL;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

static unsigned draw(uint64_t *random, unsigned below)
{
	*random = mix(*random);
	return (*random >> 32) % below;
}

static void expect(unsigned char *to, size_t count, uint64_t seed, uint64_t offset)
{
	size_t done = 0;

	while (done < count) {
		uint64_t at = offset + done, word = mix(seed + (at >> 3));
		size_t skip = at & 7, part = 8 - skip;

		if (part > count - done)
			part = count - done;
		memcpy(to + done, (unsigned char *)&word + skip, part);
		done += part;
	}
}

static bool matches(const unsigned char *bytes, size_t count, uint64_t seed, uint64_t offset)
{
	size_t done = 0;

	while (done < count) {
		uint64_t at = offset + done, word = mix(seed + (at >> 3));
		size_t skip = at & 7, part = 8 - skip;

		if (part > count - done)
			part = count - done;
		if (memcmp(bytes + done, (unsigned char *)&word + skip, part))
			return false;
		done += part;
	}
	return true;
}

static uint64_t size_of_transfer(uint64_t *random)
{
	unsigned kind = draw(random, 100);

	if (kind < 60)
		return draw(random, 2000);
	if (kind < 90)
		return draw(random, 32 << 10);
	if (kind < 98)
		return draw(random, 200 << 10);
	return draw(random, 4 << 20);
}

static void make_plan(struct plan *plan, uint16_t client_port)
{
	static const unsigned sizes[] = { 100, 4000, 65536, LARGEST };
	uint64_t random = mix(run_seed ^ ((uint64_t)client_port << 32));
	int side;

	plan->seed = mix(random ^ 0x5eed);
	/* A third: the first bytes of both at once, without a word before. */
	plan->rounds = draw(&random, 3) ? 3 + draw(&random, 8) : 0;
	if (flags & LONG)
		plan->rounds = 20 + draw(&random, 200);
	for (side = 0; side < 2; side++) {
		unsigned smallest;

		plan->total[side] = size_of_transfer(&random);
		smallest = plan->total[side] > 65536 ? 1 : 0;
		plan->largest_write[side] = sizes[smallest + draw(&random, 4 - smallest)];
		plan->largest_read[!side] = sizes[smallest + draw(&random, 4 - smallest)];
		plan->wait[side] = draw(&random, 16) ? draw(&random, 4) : DONTWAIT;
		plan->slow_us[side] = draw(&random, 20) ? 0 : 1 + draw(&random, 8000);
	}
	plan->end = draw(&random, 3);
	if ((flags & RESETS) && !draw(&random, 4))
		plan->end = RESET;
	plan->reset_after = draw(&random, 30000);
}

static void fail(struct stream *stream, const char *problem)
{
	if (!stream->problem)
		stream->problem = problem;
}

/* Until it may be read (or, with `out`, written). */
static bool ready(struct stream *stream, bool out)
{
	struct timeval patience = { .tv_sec = PATIENCE_MS / 1000 };
	struct pollfd entry = { .fd = stream->fd, .events = POLLIN | (out ? POLLOUT : 0) };
	struct epoll_event event;
	fd_set in, outs;
	int count;

	switch (stream->fd < FD_SETSIZE || stream->wait != SELECT ? stream->wait : POLL) {
	case SELECT:
		FD_ZERO(&in);
		FD_ZERO(&outs);
		FD_SET(stream->fd, &in);
		if (out)
			FD_SET(stream->fd, &outs);
		count = select(stream->fd + 1, &in, &outs, NULL, &patience);
		break;
	case EPOLL_LEVEL:
		event.events = EPOLLIN | (out ? EPOLLOUT : 0);
		epoll_ctl(stream->epoll, EPOLL_CTL_MOD, stream->fd, &event);
		count = epoll_wait(stream->epoll, &event, 1, PATIENCE_MS);
		break;
	case EPOLL_EDGE:
		count = epoll_wait(stream->epoll, &event, 1, PATIENCE_MS);
		break;
	default:
		count = poll(&entry, 1, PATIENCE_MS);
	}
	if (count == 0)
		fail(stream, "HANGS");
	return count > 0 || (count < 0 && errno == EINTR);
}

/* Bytes sent; 0 when it would block; -1 when the connection is broken. */
static ssize_t put(struct stream *stream, size_t count)
{
	ssize_t sent;

	expect(stream->buffer, count, stream->seed[stream->side], stream->sent);
	sent = send(stream->fd, stream->buffer, count,
		    MSG_NOSIGNAL | (stream->wait == DONTWAIT ? MSG_DONTWAIT : 0));
	if (sent < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -1;
	stream->sent += sent;
	return sent;
}

static ssize_t get(struct stream *stream, size_t count)
{
	ssize_t length = recv(stream->fd, stream->buffer, count, stream->wait == DONTWAIT ? MSG_DONTWAIT : 0);

	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -1;
	if (length == 0) {
		stream->peer_closed = true;
		return -1;
	}
	if (!matches(stream->buffer, length, stream->seed[!stream->side], stream->read))
		fail(stream, "WRONG BYTES");
	stream->read += length;
	return length;
}

/* Exactly so many, of one of the rounds. */
static bool put_all(struct stream *stream, size_t count)
{
	while (count) {
		ssize_t sent = put(stream, count);

		if (sent < 0 || (sent == 0 && !ready(stream, true)))
			return false;
		count -= sent;
	}
	return true;
}

static bool get_all(struct stream *stream, size_t count)
{
	while (count) {
		ssize_t length = get(stream, count);

		if (length < 0 || stream->problem || (length == 0 && !ready(stream, false)))
			return false;
		count -= length;
	}
	return true;
}

static bool talk_in_rounds(struct stream *stream, struct plan *plan)
{
	uint64_t sizes = plan->seed ^ 7;
	unsigned round;

	for (round = 0; round < plan->rounds; round++) {
		unsigned question = 1 + draw(&sizes, 200), answer = 1 + draw(&sizes, 400);

		if (stream->side == 0) {
			if (!put_all(stream, question) || !get_all(stream, answer))
				return false;
		} else if (!get_all(stream, question) || !put_all(stream, answer)) {
			return false;
		}
	}
	return true;
}

/* Both directions at once, until both are done. */
static bool talk_at_once(struct stream *stream, struct plan *plan)
{
	int side = stream->side;
	uint64_t to_send = stream->sent + plan->total[side], to_read = stream->read + plan->total[!side];
	bool has_shut = false;

	if (plan->slow_us[side]) {
		/* What there is to say is said first: the peer may be slow too. */
		while (stream->sent < to_send) {
			uint64_t rest = to_send - stream->sent;

			if (put(stream, rest < LARGEST ? rest : LARGEST) <= 0)
				break;
		}
		usleep(plan->slow_us[side]);
	}
	for (;;) {
		bool moved = false;
		ssize_t done;

		if (plan->end == RESET && side == 0 && stream->sent + stream->read >= plan->reset_after)
			return true;
		if (stream->sent < to_send) {
			size_t count = 1 + draw(&stream->random, plan->largest_write[side]);

			if (count > to_send - stream->sent)
				count = to_send - stream->sent;
			done = put(stream, count);
			if (done < 0)
				return false;
			moved |= done > 0;
		}
		if (stream->sent == to_send && plan->end == HALF_CLOSE && !has_shut) {
			shutdown(stream->fd, SHUT_WR);
			has_shut = true;
		}
		if (stream->read < to_read) {
			size_t count = 1 + draw(&stream->random, plan->largest_read[side]);

			if (count > to_read - stream->read)
				count = to_read - stream->read;
			done = get(stream, count);
			if (done < 0 || stream->problem)
				return false;
			moved |= done > 0;
		}
		if (stream->sent == to_send && stream->read == to_read)
			return true;
		if (!moved && !ready(stream, stream->sent < to_send))
			return false;
	}
}

static void wait_for_end(struct stream *stream)
{
	while (!stream->peer_closed && !stream->problem) {
		ssize_t length = get(stream, 100);

		if (length > 0)
			fail(stream, "BYTES AFTER THE LAST");
		if (length < 0 && !stream->peer_closed)
			fail(stream, "NO ORDERLY END");
		if (length == 0)
			ready(stream, false);
	}
}

/*
 * Reads on, whatever comes. It sleeps only once there is nothing left to read: what came and the reset right behind it can be one
 * edge, told already, and no other follows.
 */
static void wait_for_reset(struct stream *stream)
{
	while (!stream->problem) {
		ssize_t length = get(stream, LARGEST);

		if (length < 0)
			return;
		if (length == 0)
			ready(stream, false);
	}
}

static void talk(int fd, int side, uint16_t client_port, unsigned char *buffer)
{
	struct stream stream = { .fd = fd, .epoll = -1, .side = side, .buffer = buffer };
	struct linger linger = { .l_onoff = 1, .l_linger = 0 };
	struct epoll_event event = { .events = EPOLLIN | EPOLLOUT | EPOLLET };
	struct plan plan;
	int one = 1;
	bool whole;

	make_plan(&plan, client_port);
	stream.random = plan.seed + side;
	stream.seed[0] = mix(plan.seed ^ 1);
	stream.seed[1] = mix(plan.seed ^ 2);
	stream.wait = plan.wait[side];
	if (stream.wait != DONTWAIT)
		fcntl(fd, F_SETFL, O_NONBLOCK);
	if (plan.seed & 16)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (stream.wait == EPOLL_LEVEL || stream.wait == EPOLL_EDGE) {
		stream.epoll = epoll_create1(0);
		if (stream.wait == EPOLL_LEVEL)
			event.events = EPOLLIN;
		epoll_ctl(stream.epoll, EPOLL_CTL_ADD, fd, &event);
	}
	whole = talk_in_rounds(&stream, &plan) && talk_at_once(&stream, &plan);
	if (plan.end == RESET) {
		if (side == 0)
			setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
		else
			wait_for_reset(&stream);
		__sync_fetch_and_add(&resets, 1);
	} else if (!whole) {
		fail(&stream, stream.peer_closed ? "ENDS TOO EARLY" : "BROKEN");
	} else if (plan.end == HALF_CLOSE || (plan.end == CLIENT_FIRST) == (side == 1)) {
		wait_for_end(&stream);
	}
	if (stream.problem) {
		fprintf(stderr,
			"%s: %s: port %u, seed %lu: sent %lu, read %lu, rounds %u, totals %lu/%lu, end %d, wait %d/%d\n",
			side ? "server" : "client", stream.problem, client_port, plan.seed, stream.sent,
			stream.read, plan.rounds, plan.total[0], plan.total[1], plan.end, plan.wait[0],
			plan.wait[1]);
		__sync_fetch_and_add(&bad, 1);
	} else {
		__sync_fetch_and_add(&good, 1);
	}
	__sync_fetch_and_add(&total_sent, stream.sent);
	__sync_fetch_and_add(&total_read, stream.read);
	close(fd);
	if (stream.epoll >= 0)
		close(stream.epoll);
}

static uint16_t port_of(int (*name)(int, struct sockaddr *, socklen_t *), int fd)
{
	struct sockaddr_storage found;
	socklen_t length = sizeof(found);

	if (name(fd, (struct sockaddr *)&found, &length))
		return 0;
	/* At the same place in both families. */
	return ntohs(((struct sockaddr_in *)&found)->sin_port);
}

static void *serve(void *unused)
{
	unsigned char *buffer = malloc(LARGEST);

	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		uint16_t port;

		if (fd < 0)
			return NULL;
		port = port_of((void *)getpeername, fd);
		if (port == 0) { /* reset already */
			close(fd);
			continue;
		}
		talk(fd, 1, port, buffer);
	}
}

static void *dial(void *unused)
{
	unsigned char *buffer = malloc(LARGEST);

	while ((int64_t)__sync_fetch_and_sub(&left, 1) > 0) {
		int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (connect(fd, (struct sockaddr *)&address, address_length)) {
			perror("connect");
			__sync_fetch_and_add(&bad, 1);
			close(fd);
			continue;
		}
		talk(fd, 0, port_of((void *)getsockname, fd), buffer);
	}
	return NULL;
}

static void report(void)
{
	printf("{\"good\": %lu, \"bad\": %lu, \"resets\": %lu, \"sent\": %lu, \"read\": %lu}\n", good, bad,
	       resets, total_sent, total_read);
	fflush(stdout);
}

int main(int count, char **arguments)
{
	struct sockaddr_in6 *six = (void *)&address;
	struct sockaddr_in *four = (void *)&address;
	int threads, number, one = 1;
	sigset_t signals;

	if (count < 7)
		return 2;
	threads = atoi(arguments[4]);
	run_seed = mix(strtoull(arguments[5], NULL, 10));
	flags = atoi(arguments[6]);
	if (flags & MAPPED) {
		char text[100];

		snprintf(text, sizeof(text), "::ffff:%s", arguments[2]);
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(arguments[3]));
		inet_pton(AF_INET6, text, &six->sin6_addr);
		address_length = sizeof(*six);
	} else if (strchr(arguments[2], ':')) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(atoi(arguments[3]));
		inet_pton(AF_INET6, arguments[2], &six->sin6_addr);
		address_length = sizeof(*six);
	} else {
		four->sin_family = AF_INET;
		four->sin_port = htons(atoi(arguments[3]));
		inet_pton(AF_INET, arguments[2], &four->sin_addr);
		address_length = sizeof(*four);
	}
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	pthread_t workers[threads];

	if (!strcmp(arguments[1], "serve")) {
		listener = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (bind(listener, (struct sockaddr *)&address, address_length) || listen(listener, 4096)) {
			perror("listen");
			return 1;
		}
		for (number = 0; number < threads; number++)
			pthread_create(&workers[number], NULL, serve, NULL);
		printf("ready\n");
		fflush(stdout);
		sigwait(&signals, &number);
		/* No more are accepted, but each that was comes to its end: one that sleeps for ever is found out too. */
		shutdown(listener, SHUT_RDWR);
	} else {
		left = atoi(arguments[7]);
		for (number = 0; number < threads; number++)
			pthread_create(&workers[number], NULL, dial, NULL);
	}
	for (number = 0; number < threads; number++)
		pthread_join(workers[number], NULL);
	report();
	return bad != 0;
}
