/* SPDX-License-Identifier: Apache-2.0 */
/* An echo server that reads by io_uring, one thread for each connection: ring_echo PORT. */
#define _GNU_SOURCE
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIZE 65536

static void *echo(void *argument)
{
	int client = (intptr_t)argument;
	struct io_uring_params p = {};
	int ring = syscall(SYS_io_uring_setup, 1, &p);
	char *sq = mmap(0, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
	char *cq = mmap(0, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
	struct io_uring_sqe *sqe = mmap(0, p.sq_entries * sizeof(*sqe), PROT_READ | PROT_WRITE,
					MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
	char *buffer = malloc(SIZE);

	for (;;) {
		unsigned *tail = (unsigned *)(sq + p.sq_off.tail), *head = (unsigned *)(cq + p.cq_off.head);
		struct io_uring_cqe *cqe;
		int length, done = 0;

		memset(sqe, 0, sizeof(*sqe));
		sqe->opcode = IORING_OP_RECV;
		sqe->fd = client;
		sqe->addr = (uintptr_t)buffer;
		sqe->len = SIZE;
		((unsigned *)(sq + p.sq_off.array))[0] = 0;
		__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
		if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
			break;
		cqe = (struct io_uring_cqe *)(cq + p.cq_off.cqes) + (*head & (p.cq_entries - 1));
		length = cqe->res;
		__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
		if (length <= 0)
			break;
		while (done < length) {
			ssize_t sent = send(client, buffer + done, length - done, MSG_NOSIGNAL);

			if (sent < 0)
				return NULL;
			done += sent;
		}
	}
	close(client);
	close(ring);
	return NULL;
}

int main(int count, char **arguments)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_port = htons(atoi(arguments[1])) };
	int listener = socket(AF_INET6, SOCK_STREAM, 0), one = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 100))
		return 1;
	for (;;) {
		int client = accept(listener, NULL, NULL);
		pthread_t thread;

		if (client >= 0)
			pthread_create(&thread, NULL, echo, (void *)(intptr_t)client);
	}
}
