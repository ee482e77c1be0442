/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Inspected flows: the kernel's part of the ten rules (docs/architecture.md). It accepts what the profile's automaton
 * accepts, passes what is proven (acknowledged, equal to the record, inside a pass window), follows
 * acknowledgements, and hands everything else up: from then on the boundary is Python's, until Python lends it back.
 *
 * Functions stand in the order in which a packet meets them; each returns a `step`.
 */
#ifndef ISOLATOR_FLOW7_H
#define ISOLATOR_FLOW7_H

#include "isolator_maps.h"
#include "isolator_packet.h"
#include "isolator_automaton.h"

/* What becomes of a packet: 0 forward · STEP_CUT forward without payload · STEP_DROP | reason · STEP_PUNT | reason */
#define STEP_FORWARD 0
#define STEP_CUT 0x100
#define STEP_DROP 0x200
#define STEP_PUNT 0x400
#define STEP_REASON(step) ((step) & 0xff)

#define COPY_MAX 2048 /* a wire segment with its header, with room to spare */
struct payload_copy {
	__u8 bytes[COPY_MAX + 4];
};
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, flow7_scratch, __u32, struct flow7, 1, 0);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, payload_scratch, __u32, struct payload_copy, 1, 0);

static __always_inline int agent_is_up(void)
{
	struct control *c = the_control();

	return c && (__s64)(bpf_ktime_get_ns() - c->heartbeat) < (__s64)c->heartbeat_max;
}

/* Nobody else changes the half until its word is set; whoever is at it ends first. */
static __always_inline int claim(struct half *half, __u32 next)
{
	__u64 word = half->word;

	return WORD_OWNER(word) != OWNER_BUSY && WORD_NEXT(word) == next &&
	       __sync_val_compare_and_swap(&half->word, word, WORD(WORD_NEXT(word), OWNER_BUSY, WORD_PUNTS(word))) == word;
}

/* R9: the SYN-ACK for the pending SYN begins a new incarnation; nothing of the old one remains. The half is claimed. */
static __always_inline void incarnate(struct flow7 *f, struct half *client, struct half *server, const struct packet *p)
{
	__builtin_memset(client->windows, 0, sizeof(client->windows));
	client->acked = p->ack;
	client->record_len = 0;
	client->mode = 0;
	client->remaining = 0;
	client->flags = 0;
	client->gate = 0;
	server->flags = 0;
	server->acked = p->seq + 1;
	server->record_seq = p->seq + 1;
	server->record_len = 0;
	f->flags &= ~FLOW_PASSED_OPEN;
	f->start = p->ack;
	f->server_start = p->seq + 1;
	f->incarnation++;
	__sync_lock_test_and_set(&server->word, WORD(p->seq + 1, OWNER_KERNEL, 0));
	__sync_lock_test_and_set(&client->word, WORD(p->ack, f->automaton ? OWNER_KERNEL : OWNER_PYTHON, 0));
	f->state = FLOW7_LIVE;
}

/* A SYN sent again while the server may not have seen what followed it: the answer to it would move the boundary
 * back over bytes under way. Once the server has acknowledged any, or reset, it answers no old SYN. `start`: the first
 * number behind the SYN. */
static __always_inline int is_repeated(struct flow7 *f, struct half *client, struct half *server, __u32 start)
{
	return (f->state & FLOW7_LIVE) && start == f->start && client->acked == start &&
	       WORD_NEXT(client->word) != start && !(f->flags & FLOW_PASSED_OPEN) &&
	       !(client->flags & HALF_RST) && !(server->flags & (HALF_FIN | HALF_RST));
}

/* Likewise where the SYN was sent again before there were such bytes, and its answer comes behind them: with the
 * numbers of the connection that is there it is no other's, whatever was sent meanwhile. */
static __always_inline int is_late(struct flow7 *f, struct half *client, struct half *server, const struct packet *p)
{
	return ((f->state & FLOW7_LIVE) && p->ack == f->start && p->seq + 1 == f->server_start &&
		!(f->flags & FLOW_PASSED_OPEN)) ||
	       is_repeated(f, client, server, p->ack);
}

static __always_inline int on_syn(struct flow7 *f, struct half *client, struct half *server, const struct packet *p,
				  int from_client)
{
	__u32 next = WORD_NEXT(client->word);

	if (p->flags & (TCP_FIN | TCP_RST))
		return STEP_DROP | REASON_TCP_FLAGS;
	if (p->payload)
		return STEP_DROP | REASON_SYN_PAYLOAD;
	if (from_client != !(p->flags & TCP_ACK))
		return STEP_DROP | REASON_TCP_STATE;
	if (from_client) {
		if (is_repeated(f, client, server, p->seq + 1))
			return STEP_FORWARD;
		f->pending_seq = p->seq;
		f->state |= FLOW7_PENDING;
	} else if ((f->state & FLOW7_PENDING) && p->ack == f->pending_seq + 1 && !is_late(f, client, server, p)) {
		if (!claim(client, next)) /* what moved on meanwhile may be under way */
			return STEP_DROP | REASON_TCP_STATE; /* the server sends it again */
		incarnate(f, client, server, p);
	}
	return STEP_FORWARD;
}

/* R3: what the server has acknowledged, never beyond what it was given. */
static __always_inline void acknowledge(struct half *client, __u32 ack)
{
	__u32 next = WORD_NEXT(client->word);
	__u32 acked = client->acked;

	if ((client->flags & HALF_FIN) && ack == next + 1) { /* the FIN counts as a byte */
		client->flags |= HALF_FIN_ACKED;
		ack = next;
	}
	if (!after(ack, acked) || after(ack, next))
		return;
	__sync_val_compare_and_swap(&client->acked, acked, ack); /* lost race: the next acknowledgement says it again */
}

#define ANSWER_KEPT 512 /* bytes: most heads are shorter; where the answer ends that one does not show, time tells */

/* The server's half moves on with its payload; the beginning of the answer is kept. */
static __always_inline void follow_answer(struct __sk_buff *skb, struct half *server, const struct packet *p)
{
	__u32 end = p->seq + p->payload, length = p->payload;
	__u64 word;
	int i;

	if (server->record_len == 0 && p->seq == server->record_seq) {
		if (length > ANSWER_KEPT)
			length = ANSWER_KEPT;
		if (length > 0 && length <= ANSWER_KEPT &&
		    !bpf_skb_load_bytes(skb, p->payload_at, server->record, length))
			server->record_len = length;
	}
	for (i = 0; i < 8; i++) { /* another CPU, or a new owner, may come in between */
		word = server->word;
		if (!after(end, WORD_NEXT(word)) ||
		    __sync_val_compare_and_swap(&server->word, word, (word & ~0xffffffffull) | end) == word)
			return;
	}
}

static __always_inline int from_server(struct __sk_buff *skb, struct flow7 *f, struct half *client,
				       struct half *server, const struct packet *p)
{
	__u32 owner = WORD_OWNER(server->word);

	if (owner == OWNER_CLOSED)
		return STEP_DROP | REASON_FLOW_CLOSED;
	if (p->flags & TCP_ACK)
		acknowledge(client, p->ack);
	if (owner == OWNER_PYTHON)
		return STEP_PUNT | PUNT_REVERSE;
	if (p->flags & TCP_RST)
		server->flags |= HALF_RST;
	if (p->flags & TCP_FIN)
		server->flags |= HALF_FIN;
	if (p->payload)
		follow_answer(skb, server, p);
	return STEP_FORWARD;
}

/* Whether bytes [at, at + length) of the record are the copied ones. */
__noinline int equals_record(struct half *half, struct payload_copy *copy, __u32 at, __u32 length)
{
	__u32 i;

	if (!half || !copy)
		return 0;
	for (i = 0; i < RECORD_MAX; i++) {
		__u32 j = at + i;

		asm volatile("" : "+r"(j)); /* or the verifier sees a check of one register and a use of another */
		if (i >= length)
			return 1;
		if (j >= RECORD_MAX)
			return 0;
		if (half->record[j] != copy->bytes[i])
			return 0;
	}
	return 1;
}

/* R5, the record: 1 equal, 0 different, -1 not wholly covered, or replaced while it was read: a new record has
 * another record_seq, and record_len is 0 while its bytes are written (commit_record). */
static __always_inline int compare_record(struct __sk_buff *skb, struct half *client, const struct packet *p)
{
	__u32 record_seq = READ_ONCE(client->record_seq), record_len = READ_ONCE(client->record_len);
	__u32 zero = 0, at = p->seq - record_seq, length = p->payload;
	struct payload_copy *copy;
	int equal;

	if (at > RECORD_MAX || length > RECORD_MAX || at + length > record_len || length == 0)
		return -1;
	copy = bpf_map_lookup_elem(&payload_scratch, &zero);
	if (!copy || bpf_skb_load_bytes(skb, p->payload_at, copy->bytes, length))
		return -1;
	equal = equals_record(client, copy, at, length);
	fence(client);
	if (READ_ONCE(client->record_seq) != record_seq || READ_ONCE(client->record_len) != record_len)
		return -1;
	return equal;
}

static __always_inline int in_window(const struct half *client, __u32 start, __u32 end)
{
	int i;

#pragma unroll
	for (i = 0; i < WINDOWS_MAX; i++) {
		__u64 w = READ_ONCE(client->windows[i]);
		__u32 size = WINDOW_TO(w) - WINDOW_FROM(w);

		if (size && start - WINDOW_FROM(w) < size && end - WINDOW_FROM(w) <= size)
			return 1;
	}
	return 0;
}

/* Bytes that the client need not send again are with Python alone: without them what follows is worth nothing. */
static __always_inline int is_held(const struct half *client)
{
	return client->record_len && client->record_seq == WORD_NEXT(client->word);
}

/* What is punted is Python's to decide, and so is what follows. A CPU that is just accepting sees the punt, and hands
 * over itself (settle). */
__noinline int hand_over(struct half *client)
{
	__u64 word, then;
	int i;

	if (!client)
		return 0;
	for (i = 0; i < 64; i++) {
		word = client->word;
		then = word + WORD(0, 0, 1);
		if (WORD_OWNER(word) == OWNER_KERNEL)
			then += WORD(0, OWNER_PYTHON, 0);
		if (__sync_val_compare_and_swap(&client->word, word, then) == word)
			return 1;
	}
	return 0;
}

/* Something that only Python can decide. */
static __always_inline int needs_python(struct flow7 *f, struct half *client, int reason)
{
	if (!agent_is_up()) {
		if (!(f->flags & FLOW_FAIL_OPEN) || is_held(client))
			return STEP_DROP | REASON_AGENT_DOWN;
		f->flags |= FLOW_PASSED_OPEN;
		return STEP_FORWARD;
	}
	if (!hand_over(client))
		return STEP_DROP | REASON_INTERNAL;
	return STEP_PUNT | reason;
}

/* R8: what is acknowledged needs no window any more; 4 GiB later it would match other bytes. */
static __always_inline void retire_windows(struct half *half)
{
	int i;

#pragma unroll
	for (i = 0; i < WINDOWS_MAX; i++)
		if (!after(WINDOW_TO(half->windows[i]), half->acked))
			WRITE_ONCE(half->windows[i], 0);
}

#define CSUM_STEP 512 /* bpf_csum_diff takes no more at once before 6.14 */

/* Whether a segment's TCP checksum is finished and wrong. Unfinished ones (CHECKSUM_PARTIAL, all of GSO) hold the
 * pseudo header's sum: whoever forges that sends what its receiver refuses, and has cut its own connection off
 * here alone. What is longer than the scratch is believed. */
static __noinline int checksum_is_wrong(struct __sk_buff *skb, const struct packet *p)
{
	struct payload_copy *copy;
	__u32 zero = 0, length, i;
	__u16 check;
	__s64 sum;

	if (!p)
		return 0;
	length = p->payload_at - p->l4 + p->payload;
	sum = pseudo_sum(pseudo_ends(p), length);
	if (bpf_skb_load_bytes(skb, p->l4 + 16, &check, sizeof(check)) || check == sum)
		return 0;
	copy = bpf_map_lookup_elem(&payload_scratch, &zero);
	if (!copy || length < 20 || length > COPY_MAX || bpf_skb_load_bytes(skb, p->l4, copy->bytes, length))
		return 0;
	__builtin_memset(copy->bytes + length, 0, 3);
	length = (length + 3) & ~3u;
#pragma unroll
	for (i = 0; i < COPY_MAX; i += CSUM_STEP) {
		__u32 part = length - i < CSUM_STEP ? length - i : CSUM_STEP;

		if (i >= length)
			break;
		sum = bpf_csum_diff(0, 0, (__be32 *)(copy->bytes + i), part, sum);
	}
	return fold(sum) != 0xffff;
}

/* R2, before a byte is looked at: one wire segment at the boundary, everything earlier acknowledged, and a client that
 * has seen all of the last answer, so that the next one begins where the server stands. */
static __always_inline int may_accept(struct __sk_buff *skb, struct flow7 *f, struct half *client, struct half *server,
				      const struct packet *p, __u64 word)
{
	return f->automaton && !is_held(client) && WORD_OWNER(word) == OWNER_KERNEL && WORD_NEXT(word) == p->seq &&
	       client->acked == p->seq && p->payload <= RECORD_MAX && !skb->gso_size &&
	       (p->flags & ~TCP_PSH) == TCP_ACK && !(client->flags & (HALF_FIN | HALF_RST)) &&
	       p->ack == WORD_NEXT(server->word) && (server->record_seq != p->ack || p->seq == f->start);
}

/* Out of BUSY: to the kernel with `next` where it now stands, or to Python. 0: the flow has become another one. */
__noinline int settle(struct half *client, __u64 before, __u32 next, int owner)
{
	__u64 word;
	int i;

	if (!client)
		return 0;
	for (i = 0; i < 64; i++) {
		word = client->word;
		if (WORD_OWNER(word) != OWNER_BUSY || WORD_NEXT(word) != WORD_NEXT(before))
			return 0;
		if (WORD_PUNTS(word) != WORD_PUNTS(before)) /* R7: a frame went to Python meanwhile */
			owner = OWNER_PYTHON;
		if (__sync_val_compare_and_swap(&client->word, word, WORD(next, owner, WORD_PUNTS(word))) == word)
			return 1;
	}
	return 0;
}

/* A head that the automaton accepts: the rule, by which it goes on. Else 0, and nothing has changed but that the record,
 * which nobody needs any more, is empty. `word`: the half's, for which may_accept() holds. */
__noinline int accept_head(struct __sk_buff *skb, struct flow7 *f, const struct packet *p, __u64 word)
{
	struct half *client, *server;
	struct reader reader = {};
	__u32 length, rule = 0;

	if (!f || !p)
		return 0;
	client = &f->half[f->initiator & 1];
	server = &f->half[(f->initiator & 1) ^ 1];
	length = p->payload;
	reader.state = f->automaton;
	reader.length = length;
	if (__sync_val_compare_and_swap(&client->word, word, word + WORD(0, OWNER_BUSY, 0)) != word)
		return 0;
	WRITE_ONCE(client->record_len, 0);
	fence(client);
	/* a page of sendfile's or splice's may change under way: what is read is made the packet's own */
	if (length >= 1 && length <= RECORD_MAX && !bpf_skb_pull_data(skb, p->payload_at + length) &&
	    !bpf_skb_load_bytes(skb, p->payload_at, client->record, length))
		rule = read_head(client, &reader);
	if (!rule) {
		settle(client, word, p->seq, OWNER_KERNEL);
		return 0;
	}
	retire_windows(client);
	client->mode = 0;
	client->remaining = 0;
	WRITE_ONCE(client->record_seq, p->seq);
	server->record_len = 0;
	server->record_seq = p->ack;
	client->flags = (client->flags & ~HALF_HEAD) | HALF_ALONE | (client->record[0] == 'H' ? HALF_HEAD : 0);
	fence(client);
	WRITE_ONCE(client->record_len, length);
	if (settle(client, word, p->seq + length, OWNER_KERNEL))
		return rule;
	WRITE_ONCE(client->record_len, 0); /* nothing of this connection is left to the new one */
	return 0;
}

/* Payload of the inspected half: R4, R5, R6. What lies on both sides of `acked` is Python's to cut. */
static __always_inline int client_payload(struct __sk_buff *skb, struct flow7 *f, struct half *client,
					  struct half *server, const struct packet *p, __u32 *accepted)
{
	__u32 next = WORD_NEXT(client->word), acked = client->acked;
	__u32 end = p->seq + p->payload;
	__u64 word;
	int equal;

	if (!after(end, acked)) /* R4; where a FIN would then lie below `acked`, Python builds a right one */
		return p->flags & TCP_FIN ? needs_python(f, client, PUNT_PAYLOAD) : STEP_CUT;
	if (after(end, next)) {
		if (client->flags & (HALF_FIN | HALF_RST))
			return STEP_DROP | REASON_TCP_STATE;
		word = client->word;
		if (may_accept(skb, f, client, server, p, word) && !checksum_is_wrong(skb, p))
			*accepted = accept_head(skb, f, p, word);
		return *accepted ? STEP_FORWARD : needs_python(f, client, PUNT_PAYLOAD);
	}
	if (after(acked, p->seq))
		return needs_python(f, client, PUNT_PAYLOAD);
	if (in_window(client, p->seq, end)) /* overtaking what Python has yet to send would look like loss */
		return client->gate && agent_is_up() ? needs_python(f, client, PUNT_PAYLOAD) : STEP_FORWARD;
	equal = compare_record(skb, client, p);
	if (equal == 1)
		return STEP_FORWARD;
	return needs_python(f, client, equal == 0 ? PUNT_MISMATCH : PUNT_PAYLOAD);
}

static __always_inline int from_client(struct __sk_buff *skb, struct flow7 *f, struct half *client,
				       struct half *server, const struct packet *p, __u32 *accepted)
{
	__u32 next = WORD_NEXT(client->word), end = p->seq + p->payload;
	int step = STEP_FORWARD;

	if (WORD_OWNER(client->word) == OWNER_CLOSED)
		return agent_is_up() ? STEP_PUNT | PUNT_CLOSED : STEP_DROP | REASON_FLOW_CLOSED;
	if (f->flags & FLOW_PASSED_OPEN)
		return STEP_FORWARD;
	if ((server->flags & HALF_FIN) && (p->flags & TCP_ACK) && p->ack == WORD_NEXT(server->word) + 1)
		server->flags |= HALF_FIN_ACKED;
	if (p->payload && (p->flags & TCP_URG))
		return STEP_DROP | REASON_URGENT;
	if (p->flags & TCP_RST) { /* only one that the server would believe stops the flow (RFC 5961 section 3) */
		if (p->payload)
			return STEP_DROP | REASON_TCP_FLAGS;
		if (!after(client->acked, p->seq) && !after(p->seq, next))
			client->flags |= HALF_RST;
		return STEP_FORWARD;
	}
	if (p->payload)
		step = client_payload(skb, f, client, server, p, accepted);
	else if ((p->flags & TCP_FIN) && after(p->seq, next))
		step = needs_python(f, client, PUNT_PAYLOAD);
	if (step == STEP_FORWARD && (p->flags & TCP_FIN)) {
		if (after(next, end) && !in_window(client, end, end + 1)) /* would cut a message that was read */
			return STEP_DROP | REASON_TCP_STATE;
		if (!after(end, next))
			client->flags |= HALF_FIN;
	}
	return step;
}

/* Both ends have closed, and have each other's FIN: what still comes belongs to no connection. Whoever is about to
 * accept for it finds the half closed: its place in memory may be another flow's soon. */
static __always_inline int is_over(struct flow7 *f)
{
	struct half *client = &f->half[f->initiator & 1];
	__u64 word = client->word;

	if (!(f->half[0].flags & f->half[1].flags & HALF_FIN_ACKED) ||
	    WORD_OWNER(f->half[(f->initiator & 1) ^ 1].word) == OWNER_CLOSED ||
	    WORD_OWNER(word) == OWNER_CLOSED || WORD_OWNER(word) == OWNER_BUSY)
		return 0;
	return __sync_val_compare_and_swap(&client->word, word,
					   WORD(WORD_NEXT(word), OWNER_CLOSED, WORD_PUNTS(word))) == word;
}

/* One packet of an inspected flow. `accepted`: the rule of a request that was accepted here. */
static __always_inline int inspect(struct __sk_buff *skb, struct flow7 *f, const struct packet *p, int direction,
				   __u32 *accepted)
{
	int from = f->initiator == direction;
	struct half *client = &f->half[f->initiator & 1], *server = &f->half[(f->initiator & 1) ^ 1];

	if (f->flags & FLOW_DENIED)
		return STEP_DROP | f->reason;
	if (f->flags & FLOW_PLAIN)
		return STEP_FORWARD;
	if (p->flags & TCP_SYN)
		return on_syn(f, client, server, p, from);
	if (!(f->state & FLOW7_LIVE)) /* a refusal, or an end that gives up */
		return p->flags & TCP_RST && !p->payload ? STEP_FORWARD : STEP_DROP | REASON_TCP_STATE;
	if (p->flags & (TCP_FIN | TCP_RST) && checksum_is_wrong(skb, p)) /* what no receiver believes ends nothing */
		return STEP_DROP | REASON_BAD_CHECKSUM;
	return from ? from_client(skb, f, client, server, p, accepted) : from_server(skb, f, client, server, p);
}

#endif
