/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The contract between the kernel programs and user space: constants, map keys and map values.
 * bpf/wire.py mirrors it; a test compares both with the BTF of the loaded objects.
 * Any change of a layout raises MYCEL_ABI (pins live in mycel/v<ABI>/), and the layout of its map in bpf/schema.py.
 *
 * Addresses and ports are in network byte order unless a name ends in _host. "netns" is always the cookie of a network
 * namespace: for one of our pods it is the pod's key.
 */
#ifndef MYCEL_WIRE_H
#define MYCEL_WIRE_H

#define MYCEL_ABI 3

#define PORT_OUTBOUND 15001
#define PORT_OUTBOUND_L7 15002
#define PORT_HBONE 15008

/* Who a process is, by the cgroup it runs in (map roles: cgroup id -> __u32). */
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
#define IDENTITY_MESH 3 /* every workload's, in policies that tell none from another */
#define IDENTITY_FIRST 16

/* How a connection goes, or came to be admitted (struct who, socket_state and connection: kind). */
enum via {
	VIA_PLAIN = 1,	  /* nobody wrote down who dials (inbound); no peer of the mesh there (outbound) */
	VIA_DIRECT = 2,	  /* to a pod of this node, judged by the source's identity */
	VIA_PROBE = 3,	  /* dialled by ROLE_PROBER */
	VIA_TUNNEL = 4,	  /* delivered by ROLE_NODEPROXY, judged there */
	VIA_SELF = 5,	  /* a pod to its own address */
	VIA_CAPTURED = 6, /* turned to a listener of ours */
};

/* Which end of a connection an account is about. */
enum direction {
	DIRECTION_OUTBOUND = 0,
	DIRECTION_INBOUND = 1,
};

/* Why a connection was refused: event.reason, and the index into the map refusals_by_reason. */
enum reason {
	REASON_POLICY = 1,		 /* the destination's policy has no entry that allows it */
	REASON_NO_POLICY = 2,		 /* the destination has no policy (yet) */
	REASON_SPOOFED = 3,		 /* plain, with the address of an enrolled workload */
	REASON_NOT_CAPTURED = 4,	 /* one of our ports, and connect() did not put it there */
	REASON_NO_LISTENER = 5,		 /* a dead or missing listener of ours */
	REASON_NO_BACKEND = 6,		 /* a service without backends */
	REASON_OWN_PORT = 7,		 /* an application dialled one of our ports */
	REASON_NO_ADDRESS = 8,		 /* to the mesh by a family of which the pod has no address */
	REASON_MPTCP = 9,		 /* a socket that would leave connect() aside */
	REASON_MAP_FULL = 10,		 /* no room to write down who dials */
	REASON_UNKNOWN_DESTINATION = 11, /* arrived in a pod's namespace, not for the pod's address */
	REASON_REVOKED = 12,		 /* admitted, and refused by a newer policy when it was established */
	REASON_NETWORK_POLICY = 13, /* no NetworkPolicy of the destination, or of the source, allows it */
	REASON_COUNT = 16,
};

/* Map counters: what could not be written because a map was full, beside refusals by reason. */
enum counter {
	COUNTER_FULL_CONNECTING = REASON_COUNT,
	COUNTER_FULL_CAPTURED,
	COUNTER_FULL_FLOWS,
	COUNTER_FULL_REFUSED,
	COUNTER_FULL_SOCKETS,
	COUNTER_FULL_EVENTS,
	COUNTER_SHARE_CONNECTING, /* a pod has used its own share up */
	COUNTER_SHARE_CAPTURED,
	COUNTER_FULL_RECORDS,
	COUNTER_FULL_CONVERSATIONS,
	/* Maps that only the agent writes: it counts too. */
	COUNTER_FULL_ROLES,
	COUNTER_FULL_PODS,
	COUNTER_FULL_PEERS,
	COUNTER_FULL_SERVICES,
	COUNTER_FULL_BACKENDS,
	COUNTER_FULL_MEMBERS,
	COUNTER_FULL_POLICIES,
	COUNTER_FULL_LISTENERS,
	COUNTER_FULL_CLASSES,
	COUNTER_FULL_NETWORKS,
	COUNTER_FULL_INTERFACES,
	COUNTER_COUNT,
};

/* An address of either family; IPv4 is ::ffff:a.b.c.d. All zero: none. */
struct address {
	__be32 word[4];
};

/*
 * pods: netns -> pod. A namespace that is in it is in the mesh. The flags are for a pod that joins or leaves as it runs; those
 * of both are PEER_JOINING too.
 */
#define POD_PASSING 1 /* its applications' dials pass as without a mesh */
#define POD_OPEN 2    /* plain text that arrives is not judged: no sk_lookup there */
#define POD_NO_SPLICE 4
struct pod {
	struct address address4; /* none: it has no address of that family */
	struct address address6;
	__u32 identity;
	__u16 flags;
	__u16 zone; /* a number of this node's; 0 is unknown */
};

/* peers: address -> peer. */
#define PEER_LOCAL 1
#define PEER_ENROLLED 2
#define PEER_JOINING 4 /* or leaving: perhaps not captured, so its plain text is judged as anybody's */
#define PEER_NODE 8    /* a node's own address: node ports are dialled there */
struct peer {
	__u64 netns; /* of a pod of this node, else 0 */
	__u32 identity;
	__u16 flags;
	__u16 zone;
};

/* Key of services and listeners. */
struct endpoint {
	struct address address;
	__be16 port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad;
};

/*
 * services: endpoint -> service. Few backends stand in it, so that no other map has to be asked, and share alike; else its
 * backends are those of (id, generation), all there before this names them. Node ports stand under ::ffff:0.0.0.0 and ::.
 *
 * The kernel may write an element that was replaced anew, for another service, while a program still reads it. So what is read
 * proves whose it is by a check word (lib/balance.h), and else is read again: of a service its key and all but few, of a backend
 * the key of its service and its endpoint.
 */
#define SERVICE_L7 1		 /* a backend, if there is one, is by what the proxy knows the service */
#define SERVICE_AFFINITY 2	 /* a client keeps its backend */
#define SERVICE_MEMBERS 4	 /* its backends are in members */
#define SERVICE_FEW 8		 /* its backends are in few */
#define SERVICE_AFFINITY_SHIFT 8 /* for so many seconds after it dialled last: flags >> this */
#define FEW_BACKENDS 16
#define DRAWS 4 /* of a backend, and reads of a service, where it changes at the same time */
#define CHECK_SEED 0x811c9dc5
#define CHECK_PRIME 0x01000193
#define CHECK_FOLD 15
struct few_backend {
	struct endpoint endpoint;
	__u32 check;
};

struct service {
	__u32 id;
	__u32 generation;
	__u32 count;
	__u32 flags;
	__u32 check;
	struct few_backend few[FEW_BACKENDS];
};

/* backends: backend_key -> backend; slots from 0 to count - 1. */
struct backend_key {
	__u32 service;
	__u32 generation;
	__u32 slot;
};

/* Who draws the slot takes this endpoint, or for all but share / 2^32 of the draws the one in another slot. */
#define SHARE_WHOLE 0xffffffff
struct backend {
	struct endpoint endpoint;
	__u32 other;
	__u32 share;
	__u32 check;
};

/* members: member_key -> the backend's check. The backends of services with SERVICE_MEMBERS, written and removed with them. */
struct member_key {
	__u32 service;
	__u32 generation;
	struct endpoint endpoint;
};

/* affinity: affinity_key -> affinity. The backend that a client had last; forgotten when there is no room. */
struct affinity_key {
	__u64 netns;
	__u32 service;
	__u32 pad;
};

struct affinity {
	struct endpoint endpoint;
	__u32 filler;
	__u64 used; /* nanoseconds, of the kernel's monotonic clock */
};

/*
 * datagrams: datagram_key -> endpoint. Of UDP sockets that talk to several services (private to the programs): where its
 * datagrams to a service go, and as whose an endpoint's are shown to it; forgotten when there is no room.
 */
#define DATAGRAM_CHOSEN 0
#define DATAGRAM_ANSWERS 1
struct datagram_key {
	__u64 socket; /* cookie */
	struct endpoint endpoint;
	__u32 kind;
};

/* udp_sockets: storage of each UDP socket that used a service (private to the programs): which one, and by which endpoint. */
struct datagram_socket {
	struct endpoint service; /* port 0: none any more */
	struct endpoint endpoint;
	__u32 connected;
};

/*
 * policies: netns -> inner map: policy_key -> __u32 verdict. Port 0 is any port without an entry; no entry refuses.
 * The entry (POLICY_GENERATION, 0) is the policy's generation instead, with flags.
 */
#define POLICY_GENERATION 0xffffffff
#define POLICY_GENERATION_MASK 0x3fffffff
#define POLICY_CLASSES 0x80000000 /* verdicts differ by the source's address: ask classes */
#define POLICY_ALIKE 0x40000000 /* verdicts are the same for every workload: IDENTITY_MESH stands for them */
struct policy_key {
	__u32 identity;
	__be16 port;
	__u16 address_class; /* of the source's address; 0 where it is in none */
};

/*
 * classes (longest prefix): class_key -> __u32 class, from 1 on. Those of a policy's generation are all there before policies
 * names it, and go after it.
 */
#define CLASS_PREFIX_BITS 96 /* of the key, before the address */
struct class_key {
	__u32 prefix_length; /* bits that count, from here on */
	__u32 generation;
	__u64 netns;
	struct address address;
};

/*
 * networks: network_of -> inner map (longest prefix): network_key -> __u32. NetworkPolicy of a pod in one direction; without an
 * inner map the pod is not isolated. Two stages in one: with stage 0 the other end's address gives its class (0 where it is in none),
 * with stage class + 1 the protocol and the destination's port (NETWORK_PORT) give the verdict; no entry refuses.
 */
#define NETWORK_PREFIX_BITS 32 /* of the key, before what is looked up */
#define NETWORK_PORT_BITS 24
#define NETWORK_PORT(protocol, port_host) bpf_htonl((__u32)(protocol) << 24 | (__u32)(port_host) << 8)
struct network_of {
	__u64 netns;
	__u32 direction; /* enum direction, as the pod sees it */
	__u32 pad;
};

struct network_key {
	__u32 prefix_length; /* bits that count, from here on */
	__u32 stage;
	struct address value;
};

/* interfaces: index of the host's end of a pod's veth -> interface. */
#define INTERFACE_FILTERS 0x80000000 /* filters judge, links perhaps too: then only one counts */
struct interface {
	__u64 netns;
	struct address address4; /* none: it has no address of that family */
	struct address address6;
	__u32 identity;
	__u32 flags; /* the pod's, and INTERFACE_FILTERS */
	__u8 mac[6]; /* the pod's own */
	__u16 pad;
};

/*
 * talks: talk_key -> talk. Who began to speak, of all that is no TCP: what answers is judged as what it answers. ICMP has the
 * identifier of its echo as both ports, and other protocols none. Fragments of a datagram have the identification in both. Who asks
 * for a lease has no addresses.
 */
#define TALK_FROM_HOST 1      /* the node began: NetworkPolicy does not forbid it */
#define TALK_EXEMPT 2	      /* and nothing else does */
#define TALK_FRAGMENTS 0x8000 /* with the protocol: the first fragment has passed */
struct talk_key {
	__u64 netns;
	struct address pod_address;
	struct address peer_address;
	__be16 pod_port;
	__be16 peer_port;
	__u16 protocol;
	__u16 direction; /* of fragments; else 0 */
};

struct talk {
	__u64 used;	 /* nanoseconds, of the kernel's monotonic clock */
	__u32 direction; /* as the pod sees it: who began */
	__u32 flags;
};

/* connecting: tuple -> who. From the client's SYN until the server's end is established, or the client closes. */
struct tuple {
	struct address client_address;
	struct address server_address;
	__be16 client_port;
	__be16 server_port;
};

/* shares: netns -> share. What a pod has in connecting and captured; a moment may be below nothing. */
struct share {
	__s64 connecting;
	__s64 captured;
};

struct who {
	__u64 netns; /* of the socket that dials */
	__u32 identity;
	__u32 generation; /* of the policy that admitted it last; 0 until then */
	__u32 kind;
	__u32 pad;
	__u64 splice; /* its cookie, if the connection may be spliced */
};

/*
 * captured: what an application dialled before connect() was turned to a listener of ours. Written by sock_ops when the
 * client's port is known, removed when the listener's end of the connection closes. Proxies read it after accept(): netns is the cookie
 * of the listener's namespace, the rest is getpeername() and the listener's port.
 */
struct captured_key {
	__u64 netns;
	struct address client_address;
	__be16 client_port;
	__be16 listener_port;
	__u32 pad;
};

struct captured {
	struct address
		destination_address; /* the endpoint that was chosen; the service's own for PORT_OUTBOUND_L7 */
	struct address service_address; /* what the application dialled */
	__be16 destination_port;
	__be16 service_port;
	__u32 identity; /* the client's, of this node */
};

/*
 * flows: flow_key -> flow; refused: flow_key -> refusals. Bytes are what the application at that end wrote and read (UDP: what
 * passed the pod's veth). An account whose sender and receiver are 0 and port 0 is of what has no room, with VERDICT_SEVERAL in
 * refused; with FLOW_FORGOTTEN too it has the sums of accounts that were dropped, and only the agent writes it.
 */
#define VERDICT_ALLOWED 0
#define VERDICT_SEVERAL 0xffff
#define FLOW_FORGOTTEN 1
struct flow_key {
	__u32 source;
	__u32 destination;
	__u16 source_zone;
	__u16 destination_zone;
	__be16 port;	/* the destination's own */
	__u16 verdict;	/* VERDICT_ALLOWED, else enum reason */
	__u8 protocol;	/* IPPROTO_TCP, IPPROTO_UDP, or what else was refused */
	__u8 direction; /* enum direction */
	__u16 flags;
};

struct flow {
	__u64 opened; /* connections, conversations */
	__u64 closed;
	__u64 sent;
	__u64 received;
	__u64 sent_datagrams;
	__u64 received_datagrams;
	__u64 retransmits;
	__u64 rtt_us; /* sum of rtt_samples smoothed round trip times: at each close, and whenever the accounts are read */
	__u64 rtt_samples;
};

struct refusals {
	__u64 count; /* of connections, of datagrams */
	__u64 bytes; /* of datagrams */
};

/*
 * conversations: conversation_key -> conversation. UDP between a pod and somebody, begun by the first datagram that was allowed,
 * ended by silence: the iterator "silent", which the agent runs, removes it.
 */
#define CONVERSATION_IDLE_NS 30000000000ULL
struct conversation_key {
	__u64 netns;
	struct address pod_address;
	struct address peer_address;
	__be16 pod_port;
	__be16 peer_port;
	__u32 pad;
};

struct conversation {
	__u64 opened; /* nanoseconds, of the kernel's monotonic clock */
	__u64 last;
	__u64 sent; /* by the pod */
	__u64 received;
	__u64 sent_datagrams;
	__u64 received_datagrams;
	struct flow_key flow;
	__u32 pad;
};

/* records (ring buffer): an end of a connection has closed, a conversation has fallen silent, something was refused. */
struct flow_record {
	__u64 netns;   /* of the pod whose end it is; 0 for what was refused on arrival */
	__u64 started; /* nanoseconds, of the kernel's monotonic clock */
	__u64 ended;
	__u64 sent;
	__u64 received;
	__u64 sent_datagrams;
	__u64 received_datagrams;
	struct tuple tuple;
	struct flow_key flow;
	__u32 rtt_us; /* smoothed; 0 is unknown */
	__u32 retransmits;
	__u32 kind; /* enum via, of TCP */
	__u32 pad;
};

/* sockets: storage of each TCP socket that we know something of (private to the programs). */
#define SOCKET_REWRITTEN 1 /* getpeername() answers service_* */
#define SOCKET_ACTIVE 2	   /* it dialled */
#define SOCKET_OPEN 4	   /* established */
#define SOCKET_COUNTED 8   /* has an account: flow */
#define SOCKET_RECORD 16   /* write down who dials: the destination is a pod of this node */
#define SOCKET_REVOKED 32
#define ACCOUNT_CLOSED 0xffffffffffffffffULL
struct socket_state {
	__u64 netns;
	__u64 cookie;	/* the socket's, of a server's end */
	__u64 sent;	/* already in the flow; ACCOUNT_CLOSED when that is all */
	__u64 received; /* the same */
	__u64 retransmits;
	__u64 opened; /* nanoseconds, of the kernel's monotonic clock */
	struct tuple tuple;
	__u32 identity;		       /* the source's */
	struct address source_address; /* that it has to dial from, or none */
	struct address destination_address;
	struct address service_address;
	__be16 destination_port;
	__be16 service_port;
	struct flow_key flow;
	__u32 generation;
	__u16 kind;
	__u16 flags;
};

/*
 * The splice (lib/splice.h; private to the programs). splice_ends: storage of each end that has an account, with an id if its
 * connection may be spliced. splices: id -> splice, from when one of the ends asks for it. splice_sockets (a sockhash): id << 1 | side -> the socket.
 */
#define SPLICE_READS 3		/* of an end, before it enters */
#define SPLICE_CAP (1 << 20)	/* bytes sent and not yet read, of one direction */
#define SPLICE_BULK (512 << 10) /* bytes of one direction for each segment of the other */

#define SPLICE_WANTED 1 /* splice_end.flags: it is in splices */
#define SPLICE_IN 2	/* in splice_sockets */
#define SPLICE_NEVER 4	/* not again */
#define SPLICE_CLOSED 8
struct splice_end {
	__u64 id; /* the cookie of the socket that dialled; 0: never */
	__u64 netns;
	__u64 read;	 /* what recv gave to the application */
	__u32 sent_base; /* the first sequence number of what it sends */
	__u32 read_base; /* and of what it reads */
	__u32 reads;
	__u32 side; /* 0: it dialled */
	__u64 flags;
	__u64 accounted; /* SPLICE_CLOSED: what of read is in the flow */
	struct flow_key flow;
	__u32 pad;
};

#define SPLICE_READY 1	/* splice.flags, << side */
#define SPLICE_JOINED 4 /* << side: in splice_sockets */
#define SPLICE_GONE 16	/* << side: closed */
#define SPLICE_LEAVING 64
#define SPLICE_READY_BOTH 3
#define SPLICE_RUNS 15 /* both ready, both joined, and nothing else */
struct splice_side {
	__u64 redirected; /* what was sent past TCP */
	__u64 read;	  /* splice_end.read, perhaps a little older */
	__u32 sent_base;
	__u32 read_base;
	__u32 redirects; /* all that is sent and not yet read was redirected */
	__u32 written;	 /* by TCP, when that began */
	__u32 pad[8];	 /* what the two ends write lies apart */
};

struct splice {
	struct splice_side side[2];
	__u64 flags;
};

/*
 * What the iterator "splice" writes, a __u64 for each end with which it did something: the cookie of its namespace, and in the lowest
 * SPLICE_STEP_BITS what.
 */
#define SPLICE_STEP_BITS 3
enum splice_step {
	SPLICE_ENTERED = 1,
	SPLICE_LEFT = 2,
	SPLICE_WAITS = 3,	/* it has to leave, and its application has not read everything yet */
	SPLICE_LEFT_UNREAD = 4, /* the same as SPLICE_LEFT, and TCP has something for it */
};

/* splice_counters: two words of state, then what happened since the map was made. */
enum splice_counter {
	SPLICE_COUNTER_OFF = 0,	  /* not 0: nothing is spliced on this node */
	SPLICE_COUNTER_WOKEN = 1, /* the agent was woken, and has not walked yet */
	SPLICE_COUNTER_ENTERED,
	SPLICE_COUNTER_LEFT,
	SPLICE_COUNTER_OVERFLOWS,
	SPLICE_COUNTER_FULL,
	SPLICE_COUNTER_COUNT,
};

/* What the iterators over open connections write, one after another. */
struct connection {
	__u64 netns;
	__u64 cookie; /* the server's socket */
	struct tuple tuple;
	__u32 source;
	__u32 destination;
	__u32 generation;
	__u32 kind;
	__u32 flags; /* SOCKET_REVOKED */
	__u64 sent;
	__u64 received;
	__u32 rtt_us; /* smoothed; 0 is unknown */
	__u32 retransmits;
};

/* events (ring buffer): a connection was refused. */
struct event {
	__u64 netns; /* of who dialled; 0 when it was refused at the destination */
	__u32 reason;
	__u32 source;
	__u32 destination;
	struct address client_address;
	struct address server_address;
	__be16 client_port;
	__be16 server_port;
};

/* recent: refusal -> when it was told last, nanoseconds (clients repeat their SYNs). */
struct refusal {
	struct tuple tuple;
	__u32 reason;
};

/* closed: slot, by the connection's fingerprint -> the last one there that was closed, and when (nanoseconds). */
#define CLOSED_SLOTS 65536
struct closed {
	__u64 fingerprint;
	__u64 when;
};

#endif
