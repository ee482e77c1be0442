/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Layer 4: policy decides a flow's first packet, flows4 repeats it. An entry is settled while its
 * policy generation is the one in force and the packet cannot be another flow's beginning.
 */
#ifndef ISOLATOR_FLOW4_H
#define ISOLATOR_FLOW4_H

#include "isolator_maps.h"
#include "isolator_packet.h"

#define IDLE_NS (180ull * 1000000000ull) /* UDP, ICMP and others: after this a flow is a new one (RFC 4787 REQ-5) */

struct decision {
	__u32 profile;
	__u32 automaton;
	__u32 rule;
	__u32 identity;
	__u8 verdict;
	__u8 reason;
	__u8 flags; /* POLICY_… */
	__u8 initiator;
};

static __always_inline struct policy_value *policy_at(struct policy_key *key)
{
	struct policy_value *value = bpf_map_lookup_elem(&policy, key);

	if (value)
		return value;
	if (key->port) {
		key->port = 0;
		value = bpf_map_lookup_elem(&policy, key);
		if (value)
			return value;
	}
	key->protocol = 0;
	value = bpf_map_lookup_elem(&policy, key);
	if (value)
		return value;
	key->peer = 0;
	return bpf_map_lookup_elem(&policy, key);
}

/* What the policy in force says of a flow that `initiator` opens. Both ICMPs are one protocol to it. */
static __noinline __attribute__((unused)) int decide(const struct flow_key *flow, struct decision *d, __u32 generation)
{
	struct identity_key address = {.prefixlen = 32 + 128, .generation = generation};
	struct policy_key key = {.generation = generation};
	struct selection_key at = {.generation = generation};
	struct policy_value *value;
	struct selection *selection;
	__u32 *identity;

	if (!flow || !d)
		return 0;
	key.endpoint = at.endpoint = flow->endpoint;
	at.direction = d->initiator;
	selection = bpf_map_lookup_elem(&selections, &at);
	if (selection) {
		address.generation = key.generation = selection->base;
		key.endpoint = selection->number;
	}
	__builtin_memcpy(address.address, flow->remote, 16);
	identity = bpf_map_lookup_elem(&identities, &address);
	d->identity = identity ? *identity : 0;
	key.peer = d->identity;
	key.direction = d->initiator;
	key.protocol = flow->protocol == IPPROTO_ICMPV6 ? IPPROTO_ICMP : flow->protocol;
	if (flow->protocol == IPPROTO_TCP || flow->protocol == IPPROTO_UDP)
		key.port = bpf_ntohs(d->initiator == INGRESS ? flow->local_port : flow->remote_port);
	value = policy_at(&key);
	if (!value) {
		d->verdict = VERDICT_DROP;
		d->reason = REASON_NO_POLICY;
		d->flags = 0;
		d->rule = d->profile = d->automaton = 0;
		return 0;
	}
	__sync_fetch_and_add(&value->hits, 1);
	d->verdict = value->verdict;
	d->reason = value->reason;
	d->flags = value->flags;
	d->rule = value->rule;
	d->profile = value->profile;
	d->automaton = value->automaton;
	if (d->verdict == VERDICT_INSPECT && flow->protocol != IPPROTO_TCP) { /* http rules allow TCP alone */
		d->verdict = VERDICT_DROP;
		d->reason = REASON_POLICY_DEFAULT;
	}
	return 0;
}

static __always_inline int is_first_syn(const struct packet *p)
{
	return p->protocol == IPPROTO_TCP && (p->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Whether the entry answers for this packet, or policy has to be asked (again). */
static __always_inline int is_settled(const struct flow4 *f, const struct packet *p, int direction, __u32 generation,
				      __u64 now)
{
	if (f->generation != generation)
		return 0;
	if (p->protocol == IPPROTO_TCP)
		return !is_first_syn(p) || (f->initiator == direction && !(f->flags & FLOW_PASSED_OPEN));
	if (f->initiator != direction && f->verdict != VERDICT_ALLOW)
		return !p->opens;
	return now - f->last_seen < IDLE_NS || f->last_seen > now;
}

/* Nobody decides by these counters: where two CPUs count at once, one of them may be lost, and no line is locked. */
static __always_inline void count_packet(__u64 *packets, __u64 *bytes, __u64 *last_seen, const struct packet *p,
					 int direction, __u64 now)
{
	packets[direction & 1]++;
	bytes[direction & 1] += p->length;
	if (*last_seen != now)
		*last_seen = now;
}

static __always_inline void count_flow4(struct flow4 *f, const struct packet *p, int direction, __u64 now)
{
	count_packet(f->packets, f->bytes, &f->last_seen, p, direction, now);
}

#endif
