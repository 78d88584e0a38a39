/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Never loaded: names every type of the contract once, so that the compiler puts all of them into the programs' BTF, where a
 * test finds them as the kernel does.
 */
#include "lib/helpers.h"

struct wire_types {
	struct address address;
	struct pod pod;
	struct peer peer;
	struct endpoint endpoint;
	struct service service;
	struct backend_key backend_key;
	struct backend backend;
	struct datagram_key datagram_key;
	struct datagram_socket datagram_socket;
	struct member_key member_key;
	struct affinity_key affinity_key;
	struct affinity affinity;
	struct policy_key policy_key;
	struct class_key class_key;
	struct network_of network_of;
	struct network_key network_key;
	struct interface interface;
	struct talk_key talk_key;
	struct talk talk;
	struct tuple tuple;
	struct who who;
	struct share share;
	struct captured_key captured_key;
	struct captured captured;
	struct flow_key flow_key;
	struct flow flow;
	struct refusals refusals;
	struct conversation_key conversation_key;
	struct conversation conversation;
	struct flow_record flow_record;
	struct socket_state socket_state;
	struct splice_end splice_end;
	struct splice splice;
	struct connection connection;
	struct event event;
	struct refusal refusal;
	struct closed closed;
};

int wire_types(struct wire_types *types)
{
	return 0;
}
