/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* What the kernel tells of flows, drops and requests, through the ring buffer `events`. */
#ifndef ISOLATOR_EVENTS_H
#define ISOLATOR_EVENTS_H

#include "isolator_maps.h"

/* A packet, and what has been decided of it. */
struct context {
	__u32 ifindex;
	__u32 generation;
	__u32 length;
	__u8 direction;
	__u8 verdict;
	__u8 reason;
	__u8 flags;
	__u32 rule;
	__u32 identity;
};

static __always_inline void fill_event(struct event *e, const struct context *c, const struct flow_key *key, __u8 type)
{
	e->time = bpf_ktime_get_ns();
	e->key = *key;
	e->rule = c->rule;
	e->identity = c->identity;
	e->ifindex = c->ifindex;
	e->length = c->length;
	e->type = type;
	e->verdict = c->verdict;
	e->reason = c->reason;
	e->direction = c->direction;
	e->flags = c->flags;
	__builtin_memset(e->pad, 0, sizeof(e->pad));
}

static __noinline int send_event(const struct context *c, const struct flow_key *key, __u8 type)
{
	struct event *e;

	if (!c || !key)
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return 0;
	fill_event(e, c, key, type);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

MAP(BPF_MAP_TYPE_PERCPU_ARRAY, sample_scratch, __u32, __u64, 1, 0);

/* One request that was accepted here: counted for its rule, and told of at a bounded rate. */
static __noinline int count_request(const struct context *c, const struct flow_key *key, const struct flow7 *f)
{
	__u64 now = now_ns(), *last, *count;
	struct request_event *e;
	const struct half *half;
	__u32 zero = 0;

	if (!c || !key || !f)
		return 0;
	count = bpf_map_lookup_elem(&requests, &c->rule);
	if (count)
		*count += 1;
	last = bpf_map_lookup_elem(&sample_scratch, &zero);
	if (!last || now - *last < REQUEST_INTERVAL_NS)
		return 0;
	*last = now;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return 0;
	half = &f->half[f->initiator & 1];
	fill_event(&e->event, c, key, EVENT_REQUEST);
	e->profile = f->profile;
	e->generation = f->generation;
	e->head_len = half->record_len;
	e->pad = 0;
	__builtin_memcpy(e->head, half->record, REQUEST_HEAD);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

#endif
