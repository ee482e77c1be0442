/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/* The maps: one source of truth for tc, XDP and Python; all pinned but for the scratch ones. */
#ifndef ISOLATOR_MAPS_H
#define ISOLATOR_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "isolator.h"

/* One load, one store. */
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

#define MAP(kind, name, key_type, value_type, entries, flags) \
	struct {                                              \
		__uint(type, kind);                           \
		__type(key, key_type);                        \
		__type(value, value_type);                    \
		__uint(max_entries, entries);                 \
		__uint(map_flags, flags);                     \
	} name SEC(".maps")

MAP(BPF_MAP_TYPE_HASH, ports, __u32, struct port, PORTS_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, addresses, struct address_key, __u32, ADDRESSES_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LPM_TRIE, identities, struct identity_key, __u32, IDENTITIES_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, policy, struct policy_key, struct policy_value, POLICY_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, selections, struct selection_key, struct selection, SELECTIONS_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_LRU_HASH, flows4, struct flow_key, struct flow4, FLOWS4_MAX, 0);
MAP(BPF_MAP_TYPE_HASH, flows7, struct flow_key, struct flow7, FLOWS7_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_HASH, endpoints, __u32, struct endpoint, ENDPOINTS_MAX, BPF_F_NO_PREALLOC);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, drops, __u32, struct drop_counter, REASONS_MAX, 0);
MAP(BPF_MAP_TYPE_ARRAY, states, __u32, struct state, STATES_MAX, 0);
MAP(BPF_MAP_TYPE_ARRAY, tables, __u32, struct table, TABLES_MAX, 0);
MAP(BPF_MAP_TYPE_ARRAY, outcomes, __u32, struct outcome, OUTCOMES_MAX, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, requests, __u32, __u64, REQUESTS_MAX, 0);
MAP(BPF_MAP_TYPE_ARRAY, control, __u32, struct control, 1, BPF_F_MMAPABLE);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, DOORBELL_BYTES);
} doorbell SEC(".maps");

/* What stands before it happens before what stands behind it, on every CPU: a compare-and-swap is a full barrier. */
static __always_inline void fence(struct half *half)
{
	__sync_val_compare_and_swap(&half->word, 0, 0);
}

static __always_inline struct control *the_control(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

/* While an upgrade copies the inspected flows none of them may change. The bound is a time, so that an agent that
 * dies over it leaves nothing frozen. */
static __always_inline int is_frozen(void)
{
	struct control *c = the_control();

	return !c || (c->frozen_until && bpf_ktime_get_ns() < c->frozen_until);
}

/* CLOCK_MONOTONIC at tick resolution: enough for ages, and a tenth of the price. */
static __always_inline __u64 now_ns(void)
{
	return bpf_ktime_get_coarse_ns();
}

/* Whether an event for this reason may be sent again (one each EVENT_INTERVAL_NS and CPU); counts it. */
static __always_inline int count_drop(__u32 reason, __u32 length)
{
	struct drop_counter *counter = bpf_map_lookup_elem(&drops, &reason);
	__u64 now = bpf_ktime_get_ns();

	if (!counter)
		return 0;
	counter->packets++;
	counter->bytes += length;
	if (now - counter->last_event < EVENT_INTERVAL_NS)
		return 0;
	counter->last_event = now;
	return 1;
}

#endif
