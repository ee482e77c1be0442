// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * tc: a packet's way through the kernel's half.
 *
 *   port → headers → MAC → ARP and neighbour discovery | ICMP error | flow
 *   flow: flows4 settled? → flows7? → policy → forward · drop · punt to Python
 *
 * isolator_port    clsact ingress of both ports of a splice; goes on to what `classifier` holds
 * isolator_tc      that is
 * isolator_doorbell clsact ingress behind the ring, wakes Python
 * isolator_flow7   syscall, see isolator_commands.h
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "isolator.h"
#include "isolator_maps.h"
#include "isolator_packet.h"
#include "isolator_flow4.h"
#include "isolator_flow7.h"
#include "isolator_commands.h"
#include "isolator_events.h"

static __always_inline int drop(struct context *c, const struct flow_key *key, __u8 reason)
{
	c->verdict = VERDICT_DROP;
	c->reason = reason;
	if (count_drop(reason, c->length))
		send_event(c, key, EVENT_DROP);
	return TC_ACT_SHOT;
}

static __always_inline int forward(const struct port *port, int multicast)
{
	/* redirect_peer marks every frame as the receiver's own; only the long way tells broadcasts apart */
	return multicast ? bpf_redirect(port->peer_ifindex, 0) : bpf_redirect_peer(port->peer_ifindex, 0);
}

static __always_inline int punt(struct __sk_buff *skb, const struct port *port, __u32 reason, __u32 incarnation)
{
	struct control *c = the_control();

	if (!c)
		return TC_ACT_SHOT;
	bpf_set_hash(skb, PUNT_CONTEXT(port->endpoint, port->side, reason, incarnation));
	return bpf_redirect(c->punt_ifindex, 0);
}

static __always_inline int is_own(__u32 endpoint, const __u8 *address)
{
	struct address_key key = {.endpoint = endpoint};

	__builtin_memcpy(key.address, address, 16);
	return bpf_map_lookup_elem(&addresses, &key) != 0;
}

static __always_inline int is_unspecified(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	return !(words[0] | words[1] | words[2] | words[3]);
}

/* A container speaks for its own addresses alone (RFC 826; RFC 5227 section 1.1: a probe's sender is 0.0.0.0). */
static __noinline int check_arp(struct __sk_buff *skb, const struct port *port)
{
	struct arp_frame arp __attribute__((aligned(8)));
	__u8 sender[16] __attribute__((aligned(8)));
	__u32 none = 0;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)))
		return REASON_MALFORMED;
	if (port->side == SIDE_NETWORK)
		return REASON_NONE;
	map_v4(sender, arp.sender);
	if (!same_mac(arp.sender_mac, port->mac))
		return REASON_NEIGHBOUR_SPOOF;
	if (__builtin_memcmp(arp.sender, &none, 4) && !is_own(port->endpoint, sender))
		return REASON_NEIGHBOUR_SPOOF;
	return REASON_NONE;
}

/* RFC 4861: a container solicits and advertises itself; it is no router and redirects nobody. */
static __noinline int check_neighbour(struct __sk_buff *skb, const struct port *port, const struct packet *p)
{
	__u8 target[16] __attribute__((aligned(8)));

	if (port->side == SIDE_NETWORK)
		return p->type >= ROUTER_ADVERTISEMENT && p->type <= NEIGHBOUR_ADVERTISEMENT ? REASON_NONE : REASON_NEIGHBOUR_SPOOF;
	if (p->type != ROUTER_SOLICITATION && p->type != NEIGHBOUR_SOLICITATION && p->type != NEIGHBOUR_ADVERTISEMENT)
		return REASON_NEIGHBOUR_SPOOF;
	if (!is_unspecified(p->source) && !is_own(port->endpoint, p->source))
		return REASON_FOREIGN_SOURCE;
	if (p->type != NEIGHBOUR_ADVERTISEMENT)
		return REASON_NONE;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + 40 + 8, target, sizeof(target)))
		return REASON_MALFORMED;
	return is_own(port->endpoint, target) ? REASON_NONE : REASON_NEIGHBOUR_SPOOF;
}

/* The tuple that an ICMP error speaks of (RFC 792, RFC 4443 section 3): that of a packet its receiver sent. */
static __always_inline int inner_tuple(struct __sk_buff *skb, const struct packet *p, struct packet *inner)
{
	__u32 at = p->l4 + 8, l4;
	__u8 head[40] __attribute__((aligned(8)));
	__be16 ports[4] __attribute__((aligned(8)));

	if (p->version == 4) {
		if (bpf_skb_load_bytes(skb, at, head, 20) || head[0] != 0x45 || ((head[6] & 0x1f) | head[7]))
			return -1;
		inner->protocol = head[9];
		map_v4(inner->source, head + 12);
		map_v4(inner->destination, head + 16);
		l4 = at + 20;
	} else {
		if (bpf_skb_load_bytes(skb, at, head, 40) || head[0] >> 4 != 6)
			return -1;
		inner->protocol = head[6];
		__builtin_memcpy(inner->source, head + 8, 16);
		__builtin_memcpy(inner->destination, head + 24, 16);
		l4 = at + 40;
	}
	if (bpf_skb_load_bytes(skb, l4, ports, sizeof(ports)))
		return -1;
	inner->source_port = inner->destination_port = 0;
	if (inner->protocol == IPPROTO_TCP || inner->protocol == IPPROTO_UDP) {
		inner->source_port = ports[0];
		inner->destination_port = ports[1];
	} else if (inner->protocol == IPPROTO_ICMP || inner->protocol == IPPROTO_ICMPV6) {
		inner->source_port = inner->destination_port = ports[2];
	}
	return 0;
}

/* Path MTU discovery and refusals pass where the flow they speak of does, by the policy in force, and speak to
 * its end alone. */
static __noinline int check_icmp_error(struct __sk_buff *skb, const struct port *port, const struct packet *p,
				       __u32 generation)
{
	struct packet inner = {};
	struct flow_key key;
	struct flow4 *f4;
	struct flow7 *f7;
	int direction;

	if (!port || !p)
		return REASON_INTERNAL;
	direction = port->side == SIDE_CONTAINER ? EGRESS : INGRESS;
	if (inner_tuple(skb, p, &inner) || !same_address(inner.source, p->destination))
		return REASON_ICMP_UNRELATED;
	if (direction == EGRESS && !is_own(port->endpoint, p->source))
		return REASON_FOREIGN_SOURCE;
	flow_key_of(&key, &inner, port->endpoint, !direction); /* the inner packet went the other way */
	f4 = bpf_map_lookup_elem(&flows4, &key);
	if (f4)
		return f4->generation == generation && f4->verdict == VERDICT_ALLOW ? REASON_NONE : REASON_ICMP_UNRELATED;
	f7 = bpf_map_lookup_elem(&flows7, &key);
	return f7 && f7->generation == generation && !(f7->flags & FLOW_DENIED) ? REASON_NONE : REASON_ICMP_UNRELATED;
}

/* R4: the header goes on without its payload. A checksum still to be completed (CHECKSUM_PARTIAL) holds
 * the pseudo header's sum; any other one is made anew. */
static __noinline int cut_payload(struct __sk_buff *skb, const struct packet *p)
{
	__u32 header, at;
	__u8 tcp[60] __attribute__((aligned(8))) = {};
	__u16 check, length;
	__u64 ends;
	__s64 sum;

	if (!p)
		return -1;
	header = p->payload_at - p->l4;
	at = p->l4;
	if (header < 20 || header > 60)
		return -1;
	if (bpf_skb_load_bytes(skb, at + 16, &check, 2))
		return -1;
	ends = pseudo_ends(p);
	int partial = check == pseudo_sum(ends, header + p->payload);
	__u16 old = p->version == 4 ? bpf_htons(p->l4 - ETH_HLEN + header + p->payload) : 0;

	if (bpf_skb_change_tail(skb, p->payload_at, 0))
		return -1;
	if (p->version == 4) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + 2, &old, 2))
			return -1;
		length = bpf_htons(p->l4 - ETH_HLEN + header);
		bpf_l3_csum_replace(skb, ETH_HLEN + 10, old, length, 2);
		bpf_skb_store_bytes(skb, ETH_HLEN + 2, &length, 2, 0);
	} else {
		length = bpf_htons(header);
		bpf_skb_store_bytes(skb, ETH_HLEN + 4, &length, 2, 0);
	}
	check = 0;
	if (partial) {
		check = pseudo_sum(ends, header);
	} else {
		bpf_skb_store_bytes(skb, at + 16, &check, 2, 0);
		header &= 0x3c;
		if (header < 20 || header > 60 || bpf_skb_load_bytes(skb, at, tcp, header))
			return -1;
		sum = bpf_csum_diff(0, 0, (__be32 *)tcp, sizeof(tcp), pseudo_sum(ends, header));
		check = ~fold(sum);
	}
	return bpf_skb_store_bytes(skb, at + 16, &check, 2, 0);
}

static __always_inline int flow7_step(struct __sk_buff *skb, struct context *c, const struct port *port,
				      const struct flow_key *key, struct flow7 *f, const struct packet *p)
{
	__u32 accepted = 0;
	int step = inspect(skb, f, p, c->direction, &accepted);

	count_packet(f->packets, f->bytes, &f->last_seen, p, c->direction, now_ns());
	c->rule = f->rule;
	c->identity = f->identity;
	c->flags = f->flags;
	if (accepted) {
		c->rule = accepted;
		c->verdict = VERDICT_ALLOW;
		count_request(c, key, f);
	}
	if (step & STEP_DROP)
		return drop(c, key, STEP_REASON(step));
	if (step & STEP_PUNT)
		return punt(skb, port, STEP_REASON(step), f->incarnation);
	if ((step & STEP_CUT) && cut_payload(skb, p))
		return drop(c, key, REASON_INTERNAL);
	if (is_over(f))
		forget(key);
	return forward(port, 0);
}

/* A changed policy holds for live connections too. */
static __always_inline int renew_flow7(struct flow7 *f, const struct flow_key *key, __u32 generation)
{
	struct decision d = {.initiator = f->initiator};

	decide(key, &d, generation);
	f->rule = d.rule;
	f->identity = d.identity;
	f->automaton = d.automaton;
	if (d.verdict == VERDICT_INSPECT) {
		if (f->flags & FLOW_PLAIN || f->half[f->initiator & 1].mode == MODE_OPAQUE) { /* is read no more */
			if (!(d.flags & (POLICY_FAIL_OPEN | POLICY_UNREAD)))
				return PUNT_STATE_LOST;
			if (!(d.flags & POLICY_UNREAD))
				f->flags |= FLOW_PASSED_OPEN;
		}
		f->profile = d.profile;
		f->flags &= ~(FLOW_DENIED | FLOW_FAIL_OPEN);
		if (d.flags & POLICY_FAIL_OPEN)
			f->flags |= FLOW_FAIL_OPEN;
	} else if (d.verdict == VERDICT_ALLOW) {
		f->flags = (f->flags & ~FLOW_DENIED) | FLOW_PLAIN;
	} else {
		f->flags |= FLOW_DENIED;
		f->reason = d.reason;
	}
	f->generation = generation;
	return 0;
}

static __always_inline int open_flow7(const struct flow_key *key, const struct decision *d, __u32 generation)
{
	__u32 zero = 0, number = key->endpoint;
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &number);
	struct flow7 *f = bpf_map_lookup_elem(&flow7_scratch, &zero);

	if (!endpoint || !f || endpoint->flows7 >= endpoint->flows7_max)
		return REASON_FLOWS_FULL;
	f->last_seen = now_ns();
	f->profile = d->profile;
	f->rule = d->rule;
	f->generation = generation;
	f->identity = d->identity;
	f->automaton = d->automaton;
	f->initiator = d->initiator;
	f->incarnation = bpf_get_prandom_u32();
	f->flags = d->flags & POLICY_FAIL_OPEN ? FLOW_FAIL_OPEN : 0;
	if (bpf_map_update_elem(&flows7, key, f, BPF_NOEXIST))
		return bpf_map_lookup_elem(&flows7, key) ? REASON_NONE : REASON_FLOWS_FULL;
	__sync_fetch_and_add(&endpoint->flows7, 1);
	return REASON_NONE;
}

#define EPHEMERAL_MIN 32768 /* net.ipv4.ip_local_port_range's default */

static __always_inline int is_ephemeral(__be16 port)
{
	return bpf_ntohs(port) >= EPHEMERAL_MIN;
}

/* A packet in the middle of a connection that nobody remembers: either end may have opened it. What would have to
 * be read is taken for that. Otherwise the end with the ephemeral port has opened it; if that tells nothing, the
 * stricter answer holds. */
static __noinline int decide_midstream(const struct flow_key *key, struct decision *d, __u32 generation)
{
	struct decision other = {};
	int opened_by_peer;

	if (!key || !d)
		return 0;
	opened_by_peer = is_ephemeral(key->remote_port) - is_ephemeral(key->local_port);
	d->initiator = INGRESS;
	decide(key, d, generation);
	other.initiator = EGRESS;
	decide(key, &other, generation);
	if (d->verdict == VERDICT_INSPECT)
		return 0;
	if (other.verdict == VERDICT_INSPECT || opened_by_peer < 0 || (!opened_by_peer && d->verdict == VERDICT_ALLOW))
		*d = other;
	return 0;
}

static __always_inline int apply_flow4(struct __sk_buff *skb, struct context *c, const struct port *port,
				       const struct flow_key *key, const struct packet *p, __u8 verdict, __u8 reason,
				       int multicast)
{
	if (verdict == VERDICT_ALLOW)
		return forward(port, multicast);
	count_drop(reason, c->length);
	if (verdict == VERDICT_RESET && !(p->protocol == IPPROTO_TCP && p->flags & TCP_RST) && agent_is_up())
		return punt(skb, port, PUNT_RESET, 0); /* no reset for a reset (RFC 9293 section 3.5.2) */
	return TC_ACT_SHOT;
}

static __always_inline void record_flow(struct context *c, const struct flow_key *key, const struct decision *d)
{
	c->verdict = d->verdict;
	c->reason = d->reason;
	c->rule = d->rule;
	c->identity = d->identity;
	c->flags = d->flags;
	if (d->verdict == VERDICT_ALLOW && !(d->flags & (POLICY_AUDIT | POLICY_TRIAL)) && !count_drop(REASON_NONE, 0))
		return;
	send_event(c, key, EVENT_FLOW);
}

static __always_inline int new_flow7(struct __sk_buff *skb, struct context *c, const struct port *port,
				     const struct flow_key *key, const struct packet *p, const struct decision *d)
{
	struct flow7 *f;
	int reason = is_frozen() ? REASON_UPGRADE : open_flow7(key, d, c->generation);

	if (reason)
		return drop(c, key, reason);
	bpf_map_delete_elem(&flows4, key);
	f = bpf_map_lookup_elem(&flows7, key);
	return f ? flow7_step(skb, c, port, key, f, p) : drop(c, key, REASON_INTERNAL);
}

/* What an inspected flow's boundary is, nobody knows: reset it, or let it go where the policy prefers that. */
static __always_inline int boundary_lost(struct __sk_buff *skb, struct context *c, const struct port *port,
					 const struct flow_key *key, const struct packet *p)
{
	if (count_drop(REASON_STATE_LOST, c->length)) {
		c->verdict = VERDICT_DROP;
		c->reason = REASON_STATE_LOST;
		send_event(c, key, EVENT_DROP);
	}
	if ((p->flags & TCP_RST) || !agent_is_up())
		return TC_ACT_SHOT;
	return punt(skb, port, PUNT_STATE_LOST, 0);
}

static __noinline int remember(const struct context *c, const struct flow_key *key, const struct packet *p,
			       const struct decision *d, __u32 flags)
{
	struct flow4 fresh = {};

	if (!c || !key || !p || !d)
		return 0;
	fresh.last_seen = now_ns();
	fresh.generation = c->generation;
	fresh.rule = d->rule;
	fresh.identity = d->identity;
	fresh.verdict = d->verdict;
	fresh.reason = d->reason;
	fresh.initiator = d->initiator;
	fresh.flags = flags | (d->flags & (FLOW_AUDIT | FLOW_FAIL_OPEN));
	fresh.packets[c->direction & 1] = 1;
	fresh.bytes[c->direction & 1] = p->length;
	return bpf_map_update_elem(&flows4, key, &fresh, BPF_ANY);
}

/* Asks policy, remembers the answer, and acts on it. `f` is the entry that no longer answers, if any. */
static __always_inline int new_flow(struct __sk_buff *skb, struct context *c, const struct port *port,
				    const struct flow_key *key, const struct packet *p, struct flow4 *f, int multicast)
{
	struct decision d = {.initiator = c->direction};
	__u32 flags = 0;
	int tcp = p->protocol == IPPROTO_TCP, opens = p->opens && (!tcp || is_first_syn(p));
	int recent = f && (now_ns() - f->last_seen < IDLE_NS || f->last_seen > now_ns());

	if (tcp && (p->flags & TCP_SYN) && p->payload)
		return drop(c, key, REASON_SYN_PAYLOAD);
	/* the other end's packet may open a flow of its own, but what answers one opens none */
	if (f && (f->initiator == c->direction || !opens || (!tcp && recent && f->verdict == VERDICT_ALLOW))) {
		d.initiator = f->initiator;
		decide(key, &d, c->generation);
	} else if (opens) {
		decide(key, &d, c->generation);
	} else if (tcp) {
		decide_midstream(key, &d, c->generation);
	} else {
		return drop(c, key, REASON_ICMP_UNRELATED); /* an echo reply that nobody asked for */
	}
	if (d.verdict == VERDICT_INSPECT) {
		if (is_first_syn(p) && d.initiator == c->direction) {
			if (recent && f->initiator != d.initiator && f->verdict == VERDICT_ALLOW)
				return drop(c, key, REASON_TCP_STATE); /* it would take the live flow's place */
			return new_flow7(skb, c, port, key, p, &d);
		}
		if (!(d.flags & (POLICY_FAIL_OPEN | POLICY_TRIAL)))
			return boundary_lost(skb, c, port, key, p);
		d.verdict = VERDICT_ALLOW;
		flags = FLOW_PASSED_OPEN;
	}
	if (f && f->initiator != d.initiator && d.verdict != VERDICT_ALLOW) { /* a refused SYN disturbs no live flow */
		record_flow(c, key, &d);
		return apply_flow4(skb, c, port, key, p, d.verdict, d.reason, multicast);
	}
	remember(c, key, p, &d, flags);
	record_flow(c, key, &d);
	return apply_flow4(skb, c, port, key, p, d.verdict, d.reason, multicast);
}

static __noinline int flow(struct __sk_buff *skb, struct context *c, const struct port *port, struct packet *p,
				int multicast)
{
	struct flow_key key;
	struct flow4 *f4;
	struct flow7 *f7;
	__u64 now = now_ns();

	flow_key_of(&key, p, port->endpoint, c->direction);
	if (c->direction == EGRESS && !is_own(port->endpoint, p->source))
		return drop(c, &key, REASON_FOREIGN_SOURCE);
	f4 = bpf_map_lookup_elem(&flows4, &key);
	if (f4 && is_settled(f4, p, c->direction, c->generation, now)) {
		count_flow4(f4, p, c->direction, now);
		return apply_flow4(skb, c, port, &key, p, f4->verdict, f4->reason, multicast);
	}
	if (!f4 && p->protocol == IPPROTO_TCP) {
		f7 = bpf_map_lookup_elem(&flows7, &key);
		if (f7 && is_frozen())
			return drop(c, &key, REASON_UPGRADE);
		if (f7 && (f7->flags & FLOW_PLAIN) && is_first_syn(p) && f7->initiator == c->direction) {
			forget(&key); /* what was let go unread lets no other connection go */
			f7 = 0;
		}
		if (f7) {
			/* never back to an older one, which a packet may still go by that came before the change */
			if (!after(c->generation, f7->generation) || !renew_flow7(f7, &key, c->generation))
				return flow7_step(skb, c, port, &key, f7, p);
			if (!is_first_syn(p) || f7->initiator != c->direction)
				return boundary_lost(skb, c, port, &key, p);
			forget(&key); /* a connection of its own */
		}
	}
	return new_flow(skb, c, port, &key, p, f4, multicast);
}

/* `none`: the flow of a frame that belongs to none. */
static __always_inline int classify(struct __sk_buff *skb, const struct port *port, struct context *c,
				    const struct flow_key *none)
{
	struct packet p = {.length = skb->len};
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	int reason, multicast;

	if (skb->vlan_present)
		return drop(c, none, REASON_VLAN);
	if (data + sizeof(*eth) > end)
		return drop(c, none, REASON_MALFORMED);
	multicast = is_multicast_mac(eth->h_dest);
	if (c->direction == EGRESS && !same_mac(eth->h_source, port->mac))
		return drop(c, none, REASON_FOREIGN_MAC);
	if (c->direction == INGRESS && !multicast && !same_mac(eth->h_dest, port->mac))
		return drop(c, none, REASON_FOREIGN_DESTINATION);
	reason = read_packet(data, end, &p, skb->gso_size != 0);
	if (!reason && p.kind == KIND_ARP)
		reason = check_arp(skb, port);
	else if (!reason && p.kind == KIND_NEIGHBOUR)
		reason = check_neighbour(skb, port, &p);
	else if (!reason && p.kind == KIND_ICMP_ERROR)
		reason = check_icmp_error(skb, port, &p, c->generation);
	else if (!reason)
		return flow(skb, c, port, &p, multicast);
	return reason ? drop(c, none, reason) : forward(port, multicast);
}

/* Pulls no more than what is read directly: each byte of payload that comes along costs a new head. */
static __always_inline int headers_are_linear(struct __sk_buff *skb)
{
	__u32 need = HEADERS_MAX;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		need = ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		need = ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct tcphdr);
	if (need > skb->len)
		need = skb->len;
	return (long)skb->data + need <= (long)skb->data_end || !bpf_skb_pull_data(skb, need);
}

SEC("tc")
int isolator_tc(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *port = bpf_map_lookup_elem(&ports, &ifindex);
	struct control *control = the_control();
	struct context c = {.ifindex = ifindex, .length = skb->len};
	struct flow_key none = {};

	if (!port || !control)
		return drop(&c, &none, REASON_NO_POLICY);
	c.direction = port->side == SIDE_CONTAINER ? EGRESS : INGRESS;
	c.generation = control->generation;
	if (!headers_are_linear(skb))
		return drop(&c, &none, REASON_MALFORMED);
	none.endpoint = port->endpoint;
	return classify(skb, port, &c, &none);
}

/* The program that every port runs: one store changes it on all of them, and what it uses says which layout is in
 * force. It belongs to no layout. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, 1);
} classifier SEC(".maps");

SEC("tc")
int isolator_port(struct __sk_buff *skb)
{
	bpf_tail_call(skb, &classifier, 0);
	return TC_ACT_SHOT; /* never: it is filled before a port is attached */
}

SEC("tc")
int isolator_doorbell(struct __sk_buff *skb)
{
	struct control *c = the_control();
	__u64 ring = 1;

	/* the word is cleared only once the bell has rung, or Python would sleep on */
	if (c && c->need_wakeup && !bpf_ringbuf_output(&doorbell, &ring, sizeof(ring), BPF_RB_FORCE_WAKEUP))
		c->need_wakeup = 0;
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
