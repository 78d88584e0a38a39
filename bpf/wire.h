/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract between the kernel programs and user space: constants, map keys and map values.
 * bpf/wire.py mirrors it; a test compares both with the BTF of the loaded objects.
 * Any change of a layout raises MYCEL_ABI (pins live in mycel/v<ABI>/).
 *
 * Addresses and ports are in network byte order unless a name ends in _host.
 */
#ifndef MYCEL_WIRE_H
#define MYCEL_WIRE_H

#define MYCEL_ABI 1

#define PORT_OUTBOUND 15001
#define PORT_OUTBOUND_L7 15002
#define PORT_HBONE 15008

/* Who a process is, by the cgroup it runs in (map roles). */
enum role {
	ROLE_NONE = 0,
	ROLE_AGENT = 1,
	ROLE_NODEPROXY = 2,
	ROLE_L7PROXY = 3,
	ROLE_PROBER = 4, /* kubelet: its probes pass under STRICT */
	ROLE_ENVOY = 5,	 /* a real Envoy in l7proxy's place: its dials are turned to the node proxy */
};

/* Identities that are no workload's (struct policy_key.identity, struct who.identity). */
#define IDENTITY_PLAIN 0
#define IDENTITY_PROBE 1
#define IDENTITY_TUNNEL 2
#define IDENTITY_FIRST 16

/*
 * captured: what an application dialled before connect() was turned to a listener of ours. Written by sock_ops when the
 * client's port is known, removed when the client's socket closes. Proxies read it after accept(): netns is the cookie
 * of the listener's namespace, the rest is getpeername() and the listener's port.
 */
struct captured_key {
	__u64 netns;
	__be32 client_address;
	__be16 client_port;
	__be16 listener_port;
};

struct captured {
	__be32 destination_address; /* the endpoint that was chosen; the service's own for PORT_OUTBOUND_L7 */
	__be32 service_address;	    /* what the application dialled */
	__be16 destination_port;
	__be16 service_port;
	__u32 identity; /* the client's, of this node */
};

#endif
