/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * Requests that the kernel accepts itself (R2): a head in one wire segment, read by its profile's automaton.
 *
 *   word: KERNEL → BUSY → bytes made private, copied into the record → automaton on the record → next moves on
 *
 * The model of how an automaton reads is isolator/core/automaton/states.py; a test compares them. It accepts or it
 * does not; what it does not accept is Python's.
 */
#ifndef ISOLATOR_AUTOMATON_H
#define ISOLATOR_AUTOMATON_H

#include "isolator_maps.h"
#include "isolator_packet.h"

struct reader {
	__u32 state;
	__u32 at;
	__u32 length;
	__u32 outcome;
	__u32 bits;
	__u32 lines;
};

#define STEPS_AT_ONCE 8

#define ONES 0x0101010101010101ull
#define HIGHS 0x8080808080808080ull

/* Where in eight bytes the first one stands that is below 0x20 or 0x7f; 8: nowhere. Only the lowest flag is exact
 * ("Bit Twiddling Hacks", Anderson: hasless, haszero). */
static __always_inline __u32 first_control(__u64 word)
{
	__u64 delete = word ^ (ONES * 0x7f);
	__u64 flags = (((word - ONES * 0x20) & ~word) | ((delete - ONES) & ~delete)) & HIGHS;

	if (!flags)
		return 8;
	return ((((flags & -flags) - 1) & ONES) * ONES >> 56) - 1;
}

static __always_inline int in_set(const struct state *s, __u8 byte)
{
	return byte < 128 && s->set[byte >> 6 & 1] >> (byte & 63) & 1;
}

/* One step. Returns the next state, in which 0 is STATE_REJECT. */
static __always_inline __u32 step_state(const struct state *s, const __u8 *bytes, struct reader *r, __u32 at)
{
	__u32 i, stop;
	__u64 word;

	if (s->kind == STATE_WORD) {
		if (at + s->count > r->length)
			return s->other;
		word = *(__u64 *)(bytes + at) | s->fold;
		if ((word ^ s->word) << ((64 - 8 * s->count) & 63))
			return s->other;
		r->at = at + s->count;
		return s->next;
	}
	if (s->kind == STATE_VALUE) {
		stop = first_control(*(__u64 *)(bytes + at));
		if (stop == 8) {
			r->at = at + 8;
			return r->state;
		}
		at += stop;
		asm volatile("" : "+r"(at));
		if (at > RECORD_MAX)
			return 0;
		if (bytes[at] == '\t') {
			r->at = at + 1;
			return r->state;
		}
		if (bytes[at] != '\r' || bytes[at + 1] != '\n' || at + 2 > r->length || r->lines >= LINES_MAX)
			return 0;
		r->lines++;
		r->at = at + 2;
		return s->next;
	}
	if (s->kind == STATE_EFFECT) {
		r->lines += s->count;
		if ((r->bits & s->unless) || r->lines > LINES_MAX)
			return 0;
		r->bits |= s->sets;
		return s->next;
	}
	if (at >= r->length)
		return s->kind == STATE_BRANCH || s->kind == STATE_TABLE ? s->other : s->kind == STATE_SKIP ? s->next : 0;
	if (s->kind == STATE_BRANCH) {
#pragma unroll
		for (i = 0; i < EDGES_MAX; i++)
			if (i < s->count && s->bytes[i] == bytes[at]) {
				r->at = at + 1;
				return s->edges[i];
			}
		return s->other;
	}
	if (s->kind == STATE_SKIP) {
		for (i = 0; i < STRIDE; i++) {
			asm volatile("" : "+r"(at)); /* or a check of one register and a use of another */
			if (at >= r->length || at >= RECORD_MAX || !in_set(s, bytes[at])) {
				r->at = at;
				return s->next;
			}
			at++;
		}
		r->at = at;
		return r->state;
	}
	if (s->kind == STATE_TABLE) {
		__u32 number = s->table;
		struct table *t = bpf_map_lookup_elem(&tables, &number);

		i = bytes[at];
		asm volatile("" : "+r"(i)); /* or the bound is lost on the verifier */
		if (!t || i >= 128)
			return s->other;
		stop = t->next[i];
		if (stop == TABLE_OTHER)
			return s->other;
		r->at = at + 1;
		return stop;
	}
	if (s->kind == STATE_ONE && in_set(s, bytes[at])) {
		r->at = at + 1;
		return s->next;
	}
	return 0;
}

/* So many steps; a function that the verifier looks at once. Returns 0 when there is nothing more to read: then
 * r->state is the last state, STATE_REJECT or one that accepts. */
__noinline int read_on(struct half *half, struct reader *r)
{
	struct state *s;
	__u32 i, number;

	if (!half || !r)
		return 0;
	for (i = 0; i < STEPS_AT_ONCE; i++) {
		number = r->state;
		s = bpf_map_lookup_elem(&states, &number);
		if (!s || r->at > RECORD_MAX - 4) { /* eight bytes are read at a time */
			r->state = 0;
			return 0;
		}
		if (s->outcome)
			r->outcome = s->outcome;
		if (s->kind == STATE_ACCEPT)
			return 0;
		r->state = step_state(s, half->record, r, r->at);
		if (!r->state)
			return 0;
	}
	return 1;
}

/* The rule by which the record's first r->length bytes are accepted (an index into `requests`), or 0. */
static __always_inline __u32 read_head(struct half *half, struct reader *r)
{
	struct outcome *o;
	struct state *s;
	int i;

	for (i = 0; i < STEPS_MAX / STEPS_AT_ONCE && read_on(half, r); i++)
		;
	s = bpf_map_lookup_elem(&states, &r->state);
	o = bpf_map_lookup_elem(&outcomes, &r->outcome);
	if (!s || !o || s->kind != STATE_ACCEPT || r->at != r->length || (r->bits & s->sets) != s->sets)
		return 0;
#pragma unroll
	for (i = 0; i < ALTERNATIVES_MAX; i++)
		if ((r->bits & o->need[i]) == o->need[i])
			return o->rule[i];
	return 0;
}

#endif
