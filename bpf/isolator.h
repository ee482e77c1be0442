/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * What the kernel's half and Python's half share: every number and every layout, defined once.
 * isolator/datapath/abi.py mirrors the layouts, isolator/core/model.py the numbers; a test compares
 * each offset, size and number with this header.
 *
 * All integers are in host byte order, but for those called be16 and for addresses, which stand as
 * on the wire. IPv4 addresses are mapped into IPv6 (::ffff:a.b.c.d, RFC 4291 section 2.5.5.2).
 */
#ifndef ISOLATOR_H
#define ISOLATOR_H

#define ISOLATOR_LAYOUT 4 /* raise it with every change of a map's key or value */

/* Bounds; each has a drop reason for when it is reached. */
#define PORTS_MAX 8192
#define ADDRESSES_MAX 65536
#define IDENTITIES_MAX 131072
#define POLICY_MAX 1048576
#define SELECTIONS_MAX 65536
#define FLOWS4_MAX 262144
#define FLOWS7_MAX 65536
#define ENDPOINTS_MAX 4096
#define EVENTS_BYTES (1 << 20)
#define DOORBELL_BYTES 4096
#define RECORD_MAX 1460       /* one wire segment (R0) */
#define WINDOWS_MAX 4         /* pass windows kept per direction (R8) */
#define WINDOW_BYTES_MAX (1u << 30)
#define REASONS_MAX 64
#define STATES_MAX 65536      /* of automata, in two halves: policies never mix */
#define TABLES_MAX 16384      /* likewise */
#define OUTCOMES_MAX 32768    /* likewise */
#define REQUESTS_MAX 65536    /* rules that accept requests, likewise */

/* Direction of a packet, seen from the endpoint: ingress goes to the container. */
enum direction { INGRESS = 0, EGRESS = 1 };

/* Which end of a splice a port is. What arrives at the container port is egress. */
enum side { SIDE_CONTAINER = 0, SIDE_NETWORK = 1 };

enum verdict {
	VERDICT_NONE = 0,
	VERDICT_ALLOW = 1,
	VERDICT_DROP = 2,
	VERDICT_RESET = 3,   /* drop, and Python answers with a RST or an ICMP error */
	VERDICT_INSPECT = 4, /* a layer-7 profile decides, message by message */
};

/* Every drop has one of these, here, in Python, in metrics and on screen. */
enum drop_reason {
	REASON_NONE = 0,
	/* the frame */
	REASON_MALFORMED = 1,
	REASON_LENGTH_MISMATCH = 2,
	REASON_ETHERTYPE = 3,
	REASON_VLAN = 4,
	REASON_FOREIGN_MAC = 5,
	REASON_FOREIGN_DESTINATION = 6,
	REASON_FOREIGN_SOURCE = 7,
	REASON_FRAGMENT = 8,
	REASON_IP_OPTIONS = 9,
	REASON_EXTENSION_HEADER = 10,
	REASON_NEIGHBOUR_SPOOF = 11,
	REASON_ICMP_UNRELATED = 12,
	REASON_PROTOCOL = 13,
	/* the policy */
	REASON_POLICY_DENY = 16,    /* a rule says deny */
	REASON_POLICY_DEFAULT = 17, /* selected, and no rule allows it */
	REASON_NO_POLICY = 18,      /* nothing is known of the endpoint: closed */
	/* the flow */
	REASON_TCP_FLAGS = 24,
	REASON_SYN_PAYLOAD = 25,
	REASON_TCP_STATE = 26,
	REASON_FLOW_CLOSED = 27,
	REASON_RECORD_MISMATCH = 28,
	REASON_URGENT = 29,
	REASON_STATE_LOST = 30,
	REASON_OUT_OF_WINDOW = 31,
	REASON_BAD_CHECKSUM = 32,
	REASON_HELD_FULL = 33,
	REASON_FLOWS_FULL = 34,
	/* the agent */
	REASON_AGENT_DOWN = 40,
	REASON_SNAPLEN = 41,
	REASON_INTERNAL = 42,
	REASON_UPGRADE = 43, /* inspected flows are on their way into maps of another layout */
	/* layer 7, Python only */
	REASON_HTTP_DENY = 48,      /* a rule says deny */
	REASON_HTTP_NO_RULE = 49,   /* no rule allows the request */
	REASON_HTTP_MALFORMED = 50,
	REASON_HTTP_AMBIGUOUS = 51, /* two servers could read it differently */
	REASON_HTTP_UPGRADE = 52,
	REASON_HTTP_TOO_LONG = 53,
	REASON_NOT_HTTP = 54,
};

/* Why a frame went to Python. */
enum punt_reason {
	PUNT_NONE = 0,
	PUNT_PAYLOAD = 1,   /* new payload of an inspected flow */
	PUNT_CLOSED = 2,    /* the client of a denied flow */
	PUNT_MISMATCH = 3,  /* differs from the record: reset both ends */
	PUNT_REVERSE = 4,   /* Python follows the answers for now */
	PUNT_RESET = 5,     /* VERDICT_RESET: answer it */
	PUNT_STATE_LOST = 6,/* an inspected flow whose boundary nobody knows: reset it */
};

/* The 32 bits that go with a punted frame (bpf_set_hash, arrives as tp_rxhash). */
#define PUNT_CONTEXT(endpoint, side, reason, incarnation)                    \
	(((__u32)(endpoint) << 1 | (side)) & 0xffff) | (__u32)(reason) << 16 | \
		(__u32)((incarnation) & 0xff) << 24

/* ports: ifindex → port */
#define PORT_XDP_FORWARD 1 /* both ends keep checksums through an XDP redirect (not so on veth) */
struct port {
	__u32 peer_ifindex; /* the other port of the splice */
	__u32 endpoint;     /* 1 … 32767 */
	__u8 side;
	__u8 flags;
	__u8 mac[6]; /* the container's */
};

/* addresses: the endpoint's own; a source outside them is foreign */
struct address_key {
	__u32 endpoint;
	__u8 address[16];
};

/* identities: longest prefix. The generation stands inside the prefix: a policy's generations never mix. */
struct identity_key {
	__u32 prefixlen; /* 32 + 0 … 128 */
	__u32 generation;
	__u8 address[16];
};

/* selections: whose policy entries answer for an endpoint. Endpoints that the same policies select share them, and a
 * change of a few endpoints is a new generation of these alone: `base` is the generation that the entries and the
 * identities were written under. Not there: the entries are the endpoint's own, of this generation. */
struct selection_key {
	__u32 generation;
	__u32 endpoint;
	__u32 direction;
};
struct selection {
	__u32 base;
	__u32 number; /* policy_key.endpoint */
};

/* policy: first of (peer, protocol, port), (peer, protocol, 0), (peer, 0, 0), (0, 0, 0) decides */
struct policy_key {
	__u32 generation;
	__u32 endpoint;
	__u32 peer; /* identity; 0: any */
	__u16 port; /* the serving side's */
	__u8 protocol;
	__u8 direction;
};
#define POLICY_AUDIT 1     /* recorded */
#define POLICY_TRIAL 2     /* monitor mode: would be denied for `reason`, is allowed */
#define POLICY_FAIL_OPEN 4 /* with the agent down, what needs Python passes */
#define POLICY_UNREAD 8    /* what cannot be read passes: no rule that would have to read it is enforced */
struct policy_value {
	__u8 verdict;
	__u8 flags;
	__u8 reason; /* of a drop, or of the drop that a trial would make */
	__u8 pad;
	__u32 profile; /* of VERDICT_INSPECT */
	__u32 rule;
	__u32 automaton; /* of the profile: the state in which it begins; 0: none, Python reads every head */
	__u64 hits; /* flows it has decided */
};

/* A flow's name: the endpoint's side is `local`, whichever way a packet goes. ICMP echo: id as both ports. */
struct flow_key {
	__u32 endpoint;
	__u8 local[16];
	__u8 remote[16];
	__u16 local_port;  /* be16 */
	__u16 remote_port; /* be16 */
	__u8 protocol;
	__u8 pad[3];
};

/* flows4: LRU; can be rebuilt from policy at any time */
#define FLOW_AUDIT 1
#define FLOW_FAIL_OPEN 4
#define FLOW_PASSED_OPEN 8 /* passed while the agent was down: never called enforced */
#define FLOW_DENIED 16     /* flows7: a newer policy denies it at layer 4, for `reason` */
#define FLOW_PLAIN 32      /* flows7: a newer policy allows it at layer 4; its boundary is lost */
struct flow4 {
	__u64 packets[2]; /* by direction */
	__u64 bytes[2];
	__u64 last_seen; /* CLOCK_MONOTONIC, ns */
	__u32 generation;
	__u32 rule;
	__u32 identity;
	__u8 verdict;
	__u8 reason;
	__u8 initiator; /* direction of the first packet */
	__u8 flags;
};

/* A half's state word (R0): next | owner << 32 | punts << 34, changed only by compare-and-swap. */
enum owner { OWNER_KERNEL = 0, OWNER_BUSY = 1, OWNER_PYTHON = 2, OWNER_CLOSED = 3 };
#define WORD(next, owner, punts) ((__u64)(__u32)(next) | (__u64)(owner) << 32 | (__u64)(punts) << 34)
#define WORD_NEXT(word) ((__u32)(word))
#define WORD_OWNER(word) ((__u32)((word) >> 32) & 3)
#define WORD_PUNTS(word) ((__u32)((word) >> 34))

/* Sequence numbers [from, to) that pass uninspected; from == to: none. One word, so that it is read whole. */
#define WINDOW(from, to) ((__u64)(__u32)(from) | (__u64)(__u32)(to) << 32)
#define WINDOW_FROM(window) ((__u32)(window))
#define WINDOW_TO(window) ((__u32)((window) >> 32))

/* One direction of an inspected flow. On the client's half `record` is the last accepted message's bytes.
 * Where it begins at `next` it is what follows, held and acknowledged in the other end's name.
 * On the server's half it is the beginning of the answer that begins at record_seq: there the kernel fills
 * it (record_len 0 → n) from the first segment that starts at record_seq. */
#define MODE_OPAQUE 6 /* nothing that follows is read */
#define HALF_FIN 1
#define HALF_RST 2
#define HALF_ALONE 4 /* the last request was accepted here; its answer begins at the other half's record_seq */
#define HALF_FIN_ACKED 8 /* the other end has the FIN */
#define HALF_HEAD 16 /* and it was HEAD */
struct half {
	__u64 word;
	__u64 remaining; /* the dissector's state at `next`: bytes of body or chunk still to come after `next` */
	__u32 mode;      /* the dissector's state at `next`, see parsers/http1.py */
	__u32 acked;     /* what the other end has acknowledged of this half, never beyond next */
	__u64 windows[WINDOWS_MAX];
	__u32 window_at; /* which of them is written next */
	__u32 record_seq;
	__u16 record_len;
	__u8 flags;
	__u8 gate; /* what is in a window goes through Python too, until what is under way there has gone: in order */
	__u8 pad[4];
	__u8 record[RECORD_MAX + 4];
};

/* flows7: inspected flows; a plain hash, never evicted */
#define FLOW7_LIVE 1    /* a SYN-ACK was seen for the pending SYN */
#define FLOW7_PENDING 2 /* a SYN waits for its SYN-ACK (R9) */
struct flow7 {
	__u64 last_seen;
	__u64 packets[2];
	__u64 bytes[2];
	__u32 profile;
	__u32 rule;
	__u32 generation;
	__u32 identity;
	__u32 pending_seq; /* of the SYN that waits */
	__u32 incarnation; /* + 1 with each SYN-ACK that takes effect; begins anywhere, so that no two flows share one */
	__u8 initiator;    /* direction of the SYN; that half is inspected */
	__u8 state;        /* FLOW7_… */
	__u8 flags;        /* FLOW_… */
	__u8 reason;
	__u32 start;       /* the client's first sequence number in this incarnation */
	__u32 automaton;   /* the profile's, see policy_value */
	__u32 server_start; /* the server's */
	struct half half[2]; /* by direction */
};

/* What Python does to an inspected flow, through a syscall program. */
enum flow7_op {
	FLOW7_COMMIT = 1, /* record, window, mode, remaining; then next moves on */
	FLOW7_OWN = 2,    /* set one half's owner */
	FLOW7_DELETE = 3, /* forget the flow and give its place back */
	FLOW7_OPEN = 4,   /* open one half's gate */
	FLOW7_TAKE = 5,   /* the half is Python's from now on, wherever it stands */
};
#define COMMIT_RECORD 1 /* record[record_seq, +record_len) replaces the half's record, if it is in use no more */
#define COMMIT_WINDOW 2 /* window is added */
#define COMMIT_MARK 4   /* the answer begins where the other half stands now */
#define COMMIT_FIN 8    /* the half ends at next */
#define COMMIT_GATE 16  /* the half's gate is shut */
#define COMMIT_LEND 32  /* the kernel may decide what follows (R7) */
enum flow7_result { FLOW7_OK = 0, FLOW7_GONE = 1, FLOW7_STALE = 2 /* incarnation, owner or next not as expected */ };
struct flow7_command {
	struct flow_key key;
	__u8 op;
	__u8 direction; /* the half */
	__u8 flags;     /* COMMIT_… */
	__u8 owner;     /* the owner to set */
	__u32 incarnation;
	__u32 expect_next; /* COMMIT: where next must stand */
	__u32 next;
	__u32 mode;
	__u64 remaining;
	__u32 window_from;
	__u32 window_to;
	__u32 record_seq;
	__u16 record_len;
	__u16 pad;
	/* results */
	__u32 result;
	__u32 acked;      /* of this half */
	__u32 other_next; /* the other half's next */
	__u32 other_record_len;
	__u32 half_next;
	__u32 half_owner;
	__u8 record[RECORD_MAX + 4];
};

/* Automata (isolator/core/automaton/states.py): what a state does with the bytes at hand. Numbers in states count
 * over all automata; 0 is STATE_REJECT. */
#define STEPS_MAX 512 /* states that one head may pass */
#define STRIDE 16     /* bytes that STATE_SKIP reads in one step; STATE_VALUE reads eight, or up to a tab */
#define EDGES_MAX 4
#define LINES_MAX 100
#define ALTERNATIVES_MAX 4
#define TABLE_OTHER 0xffff /* no edge for this byte */
enum state_kind {
	STATE_REJECT = 0, /* Python reads it */
	STATE_WORD = 1,   /* `count` bytes | fold are `word`: next, behind them; else other, nothing is read */
	STATE_BRANCH = 2, /* the byte is one of bytes[count]: edges[]; else other, nothing is read */
	STATE_TABLE = 3,  /* likewise, by a table */
	STATE_SKIP = 4,   /* reads on while bytes are in the set, then next */
	STATE_ONE = 5,    /* one byte in the set, then next */
	STATE_VALUE = 6,  /* the rest of a header line and its CRLF, then next */
	STATE_EFFECT = 7, /* sets bits, rejects if any of `unless` is set; counts header lines; reads nothing */
	STATE_ACCEPT = 8, /* at the last byte, with all bits of `sets` set */
};
struct state {
	__u8 kind;
	__u8 count; /* of bytes or edges; EFFECT: header lines */
	__u16 next;
	__u16 other;
	__u16 table;
	__u32 outcome; /* the register's new value; 0: as it is */
	__u8 bytes[EDGES_MAX];
	union {
		struct {
			__u64 word, fold;
		};
		__u64 set[2]; /* bit b of set[a]: byte 64 a + b */
		struct {
			__u32 sets, unless;
		};
		__u16 edges[EDGES_MAX];
	};
};
struct table {
	__u16 next[128];
};
/* What is left to decide by header conditions: the first alternative whose bits are all set. Rule 0: Python's. */
struct outcome {
	__u32 need[ALTERNATIVES_MAX];
	__u32 rule[ALTERNATIVES_MAX]; /* index into `requests` */
};

/* endpoints: an endpoint's quota of inspected flows */
struct endpoint {
	__u32 flows7;
	__u32 flows7_max;
};

/* events: ring buffer */
enum event_type { EVENT_FLOW = 1, EVENT_DROP = 2, EVENT_REQUEST = 3 };
struct event {
	__u64 time; /* CLOCK_MONOTONIC, ns */
	struct flow_key key;
	__u32 rule;
	__u32 identity;
	__u32 ifindex;
	__u32 length; /* of the packet, bytes */
	__u8 type;
	__u8 verdict;
	__u8 reason;
	__u8 direction;
	__u8 flags; /* FLOW_… */
	__u8 pad[3];
};

/* A request that was accepted here, one each REQUEST_INTERVAL_NS and CPU; `rule` is its index into `requests`. */
#define REQUEST_HEAD 256
#define REQUEST_INTERVAL_NS 10000000ull
struct request_event {
	struct event event;
	__u32 profile;
	__u32 generation;
	__u32 head_len; /* of the whole head */
	__u32 pad;
	__u8 head[REQUEST_HEAD]; /* its beginning */
};

/* drops: per-CPU array by drop reason */
struct drop_counter {
	__u64 packets;
	__u64 bytes;
	__u64 last_event; /* frames without a flow are sampled: at most one event each EVENT_INTERVAL_NS per reason and CPU */
};
#define EVENT_INTERVAL_NS 1000000ull

/* control: one element, mmapable */
struct control {
	__u64 heartbeat;     /* CLOCK_MONOTONIC, ns; written by the agent */
	__u64 heartbeat_max; /* older than this: the agent is down */
	__u64 frozen_until;  /* CLOCK_MONOTONIC, ns; until then no inspected flow changes: its packets are dropped */
	__u32 need_wakeup;   /* Python sleeps: ring the doorbell once */
	__u32 generation;    /* the policy in force */
	__u32 punt_ifindex;  /* frames for Python are redirected to this */
	__u32 pad;
};

#endif
