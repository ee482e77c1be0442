/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * What Python does to an inspected flow. A half's word changes by compare-and-swap only (R0), and a map update
 * from user space is none: so Python asks a syscall program.
 */
#ifndef ISOLATOR_COMMANDS_H
#define ISOLATOR_COMMANDS_H

#include "isolator_maps.h"
#include "isolator_packet.h"

static __always_inline void commit_record(struct half *half, struct flow7_command *c)
{
	const __u64 *from = (const __u64 *)c->record;
	__u64 *to = (__u64 *)half->record;
	unsigned int i;

	WRITE_ONCE(half->record_len, 0); /* none, while it is written: a retransmission then goes to Python */
	fence(half);
#pragma unroll
	for (i = 0; i < sizeof(half->record) / 8; i++) /* the context takes fixed offsets alone */
		to[i] = from[i];
	fence(half);
	WRITE_ONCE(half->record_seq, c->record_seq);
	fence(half);
	half->record_len = c->record_len <= RECORD_MAX ? c->record_len : 0;
}

/* Nobody else changes the half until it is settled; punts may count up. */
static __always_inline int make_busy(struct half *half, __u64 *word)
{
	int i;

	for (i = 0; i < 64; i++) {
		if (WORD_NEXT(half->word) != WORD_NEXT(*word) || WORD_OWNER(half->word) != OWNER_PYTHON)
			return 0;
		if (__sync_val_compare_and_swap(&half->word, *word, *word - WORD(0, OWNER_PYTHON - OWNER_BUSY, 0)) == *word)
			return 1;
		*word = half->word;
	}
	return 0;
}

/* With next where it was this only asks whether the flow is still the one that Python knows. */
static __always_inline __u32 commit(struct half *half, struct half *other, struct flow7_command *c)
{
	__u64 word = half->word;

	if (WORD_NEXT(word) != c->expect_next || WORD_OWNER(word) != OWNER_PYTHON)
		return FLOW7_STALE;
	if (after(c->expect_next, c->next) || after(half->acked, c->next))
		return FLOW7_STALE; /* backwards, or so far that old numbers would seem new */
	if (!make_busy(half, &word))
		return FLOW7_STALE;
	if (c->next != c->expect_next) {
		half->flags &= ~(HALF_ALONE | HALF_HEAD);
		retire_windows(half);
		if (c->flags & COMMIT_RECORD)
			commit_record(half, c);
		else
			WRITE_ONCE(half->record_len, 0); /* it is another message's */
	} else if (c->flags & COMMIT_RECORD && half->acked == c->next) {
		commit_record(half, c); /* held bytes: what an agent that dies has acknowledged, the next one needs */
	}
	if (c->flags & COMMIT_WINDOW && c->window_to - c->window_from <= WINDOW_BYTES_MAX) {
		WRITE_ONCE(half->windows[half->window_at & (WINDOWS_MAX - 1)], WINDOW(c->window_from, c->window_to));
		half->window_at++;
	}
	if (c->flags & COMMIT_GATE)
		half->gate = 1;
	if (c->flags & COMMIT_MARK) {
		other->record_len = 0;
		other->record_seq = WORD_NEXT(other->word);
	}
	half->mode = c->mode;
	half->remaining = c->remaining;
	if (c->flags & COMMIT_FIN)
		half->flags |= HALF_FIN;
	if (settle(half, word, c->next, c->flags & COMMIT_LEND ? OWNER_KERNEL : OWNER_PYTHON))
		return FLOW7_OK;
	/* another connection meanwhile: nothing of this one is left to it */
	half->flags &= ~HALF_FIN;
	WRITE_ONCE(half->record_len, 0);
	__builtin_memset(half->windows, 0, sizeof(half->windows));
	return FLOW7_STALE;
}

static __always_inline __u32 set_owner(struct half *half, __u8 owner)
{
	__u64 word;
	int i;

	for (i = 0; i < 64; i++) {
		word = half->word;
		if (__sync_val_compare_and_swap(&half->word, word, (word & ~(3ull << 32)) | (__u64)(owner & 3) << 32) == word)
			return FLOW7_OK;
	}
	return FLOW7_STALE;
}

/* From the kernel to Python, unless it has it already. One that is just accepting is waited for. */
static __always_inline __u32 take(struct half *half)
{
	__u64 word;
	int i;

	for (i = 0; i < 512; i++) {
		word = half->word;
		if (WORD_OWNER(word) == OWNER_BUSY)
			continue;
		if (WORD_OWNER(word) != OWNER_KERNEL)
			return FLOW7_OK;
		if (__sync_val_compare_and_swap(&half->word, word, word + WORD(0, OWNER_PYTHON, 0)) == word)
			return FLOW7_OK;
	}
	return FLOW7_STALE;
}

static __always_inline __u32 forget(const struct flow_key *key)
{
	__u32 number = key->endpoint;
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &number);

	if (bpf_map_delete_elem(&flows7, key))
		return FLOW7_GONE;
	if (endpoint && endpoint->flows7)
		__sync_fetch_and_add(&endpoint->flows7, -1);
	return FLOW7_OK;
}

SEC("syscall")
int isolator_flow7(struct flow7_command *c)
{
	struct flow_key key = c->key;
	struct flow7 *f = bpf_map_lookup_elem(&flows7, &key);
	struct half *half, *other;

	c->result = FLOW7_GONE;
	if (!f)
		return 0;
	half = &f->half[c->direction & 1];
	other = &f->half[(c->direction & 1) ^ 1];
	if (f->incarnation != c->incarnation)
		c->result = FLOW7_STALE;
	else if (c->op == FLOW7_COMMIT)
		c->result = commit(half, other, c);
	else if (c->op == FLOW7_OWN)
		c->result = set_owner(half, c->owner);
	else if (c->op == FLOW7_OPEN)
		c->result = half->gate = FLOW7_OK; /* 0 */
	else if (c->op == FLOW7_TAKE)
		c->result = take(half);
	c->acked = half->acked;
	c->other_next = WORD_NEXT(other->word);
	c->other_record_len = other->record_len;
	c->half_next = WORD_NEXT(half->word);
	c->half_owner = WORD_OWNER(half->word);
	if (c->op == FLOW7_DELETE && f->incarnation == c->incarnation)
		c->result = forget(&key);
	return 0;
}

#endif
