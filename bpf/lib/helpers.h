/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Helpers of the kernel under their own types, and access to maps that the loader made before: MAP_<NAME> is a
 * descriptor that it defines. bcc's own maps are not used, because a map has to outlive the process that compiles.
 */
#ifndef MYCEL_HELPERS_H
#define MYCEL_HELPERS_H

#include <uapi/asm-generic/errno.h>
#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include "wire.h"

/* linux/socket.h, which is too much for these two. */
#define AF_INET 2
#define AF_INET6 10

#define inline_always static __attribute__((always_inline)) inline
#define MAP(name) ((void *)bpf_pseudo_fd(1, MAP_##name))

static void *(*map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*map_update)(void *map, const void *key, const void *value,
			  u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*map_delete)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static void *(*storage_get)(void *map, void *sk, void *value, u64 flags) = (void *)BPF_FUNC_sk_storage_get;
static long (*storage_delete)(void *map, void *sk) = (void *)BPF_FUNC_sk_storage_delete;
static u64 (*netns_cookie)(void *ctx) = (void *)BPF_FUNC_get_netns_cookie;
static u64 (*socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;
static u64 (*current_cgroup_id)(void) = (void *)BPF_FUNC_get_current_cgroup_id;
static u32 (*random_u32)(void) = (void *)BPF_FUNC_get_prandom_u32;
static u64 (*now_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static long (*set_retval)(int retval) = (void *)BPF_FUNC_set_retval;
static long (*ringbuf_output)(void *map, void *data, u64 size, u64 flags) = (void *)BPF_FUNC_ringbuf_output;
static void *(*ringbuf_reserve)(void *map, u64 size, u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*ringbuf_submit)(void *data, u64 flags) = (void *)BPF_FUNC_ringbuf_submit;
static long (*set_cb_flags)(void *ctx, int flags) = (void *)BPF_FUNC_sock_ops_cb_flags_set;
static long (*set_option)(void *sk, int level, int name, void *value,
			  int length) = (void *)BPF_FUNC_setsockopt;
static long (*assign_socket)(void *ctx, void *sk, u64 flags) = (void *)BPF_FUNC_sk_assign;
static long (*release_socket)(void *sk) = (void *)BPF_FUNC_sk_release;
static void *(*to_tcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_tcp_sock;
static long (*seq_write)(void *seq, const void *data, u32 size) = (void *)BPF_FUNC_seq_write;

/*
 * A member of a kernel structure by an offset of the running kernel's BTF. Written in assembly because the verifier
 * wants a plain load at a constant offset, and the compiler knows no such structure.
 */
#define LOAD(type, base, offset)                                                                      \
	({                                                                                            \
		type loaded;                                                                          \
		asm volatile("%0 = *(" #type " *)(%1 + %2)" : "=r"(loaded) : "r"(base), "i"(offset)); \
		loaded;                                                                               \
	})
/* The same for a member that is a pointer. */
#define LOAD_POINTER(base, offset)                                                              \
	({                                                                                      \
		void *loaded;                                                                   \
		asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(loaded) : "r"(base), "i"(offset)); \
		loaded;                                                                         \
	})

/*
 * The value is read where it stands: the compiler would join two branches that read two members of a context into one that reads
 * at a computed place, which the verifier refuses.
 */
#define KEEP(value) asm volatile("" : "+r"(value))
/* Before a loop: one copy of what is in it, for the compiler and for the verifier. */
#define NO_UNROLL _Pragma("clang loop unroll(disable)")
/* What was copied before is not read again after. */
#define BARRIER() asm volatile("" ::: "memory")

inline_always bool is_own_port(__be16 port)
{
	return port == bpf_htons(PORT_OUTBOUND) || port == bpf_htons(PORT_OUTBOUND_L7) ||
	       port == bpf_htons(PORT_HBONE);
}

#endif
