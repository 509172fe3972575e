/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the probes share: the few kernel types they read, and how they count.
 *
 * Types hold only the fields that are read, under the kernel's names.  libbpf finds each field in
 * the type information (BTF) of the running kernel when a probe is loaded, so neither kernel
 * headers nor a vmlinux.h are needed, and one object fits all kernels.
 */
#pragma once

typedef _Bool bool;
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed int __s32;
typedef signed long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

/* linux/bpf.h: part of the kernel's interface, these numbers do not change */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_TASK_STORAGE = 29,
};
enum { BPF_ANY = 0, BPF_NOEXIST = 1, BPF_F_NO_PREALLOC = 1, BPF_LOCAL_STORAGE_GET_F_CREATE = 1 };

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

/* linux/sched.h */
#define PF_EXITING 0x00000004 /* the same since 2.6.0 */
#define PF_KTHREAD 0x00200000 /* since 2.6.27 */
#define TASK_DEAD 0x00000080 /* since 4.14 */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
	__u64 id;
};

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup {
	struct cgroup_subsys_state self;
	int level;
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct rq {
	__u64 clock;
};

struct cfs_rq {
	struct rq *rq;
};

struct sched_entity {
	__u64 sum_exec_runtime;
	__u64 nr_migrations;
	struct cfs_rq *cfs_rq; /* CONFIG_FAIR_GROUP_SCHED */
};

struct sched_info { /* CONFIG_SCHED_INFO */
	unsigned long pcount;
	unsigned long long run_delay;
	unsigned long long last_queued;
};

struct task_struct {
	unsigned int flags;
	int exit_state;
	unsigned in_memstall : 1; /* CONFIG_PSI */
	int pid;
	unsigned long min_flt;
	unsigned long maj_flt;
	__u64 start_time;
	struct sched_entity se;
	struct sched_info sched_info;
	struct css_set *cgroups;
};

struct bpf_iter__task {
	struct task_struct *task;
};

#pragma clang attribute pop

/*
 * Maps of counters.  Each processor counts for itself, so that 32 of them do not share a cache
 * line; who reads adds up.  Memory is taken when a key is first seen (in tracing programs since
 * Linux 6.1).
 */
#define COUNTERS(name, key_type, value_type, entries)              \
	struct {                                                   \
		__uint(type, BPF_MAP_TYPE_PERCPU_HASH);            \
		__uint(map_flags, BPF_F_NO_PREALLOC);              \
		__uint(max_entries, entries);                      \
		__type(key, key_type);                             \
		__type(value, value_type);                         \
	} name SEC(".maps")

/* Something kept for each thread, and gone with it. */
#define PER_THREAD(name, value_type)                               \
	struct {                                                   \
		__uint(type, BPF_MAP_TYPE_TASK_STORAGE);           \
		__uint(map_flags, BPF_F_NO_PREALLOC);              \
		__type(key, int);                                  \
		__type(value, value_type);                         \
	} name SEC(".maps")

/* What could not be counted because a map was full.  Every probe has it. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline void count_lost(void)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&lost, &zero);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Inode number of the directory of a thread's control group in the v2 hierarchy. */
static __always_inline __u64 cgroup_of(struct task_struct *task)
{
	return task->cgroups->dfl_cgrp->kn->id;
}

/*
 * The group that a group is in, for all in which something was counted and those above them.  Who
 * reads finds the unit: what is below it is the unit's, also when it is gone by then.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u64);
} above SEC(".maps");

#define MAX_DEPTH 16

static __always_inline void note_above(struct task_struct *task)
{
	struct cgroup *group = task->cgroups->dfl_cgrp;
	__u64 id, parent;

	for (int up = 0; up < MAX_DEPTH && group->level > 0; up++) {
		id = group->kn->id;
		group = group->self.parent->cgroup;
		parent = group->kn->id;
		bpf_map_update_elem(&above, &id, &parent, BPF_ANY);
	}
}

/*
 * The counters of a key with the control group of a thread, new ones if there are none yet; NULL,
 * counted as lost, if the map is full.
 */
static __always_inline void *counters_of(void *map, const void *key, const void *zeroes,
					 struct task_struct *task)
{
	void *value = bpf_map_lookup_elem(map, key);

	if (value)
		return value;
	note_above(task);
	bpf_map_update_elem(map, key, zeroes, BPF_NOEXIST);
	value = bpf_map_lookup_elem(map, key);
	if (!value)
		count_lost();
	return value;
}

/* The same where the key is the control group and nothing else. */
static __always_inline void *counters_of_group(void *map, struct task_struct *task,
					       const void *zeroes)
{
	__u64 cgroup = cgroup_of(task);

	return counters_of(map, &cgroup, zeroes, task);
}

/*
 * Whether a thread stands still for want of memory, as the kernel sees it for /proc/pressure: not
 * one that writes to memory.max or compact_memory, and so makes room for somebody else.
 */
static __always_inline bool stalled(struct task_struct *task)
{
	return !(task->flags & PF_KTHREAD) && BPF_CORE_READ_BITFIELD(task, in_memstall);
}

/*
 * Histograms: bucket i holds what is at most 2^(FIRST_BUCKET + i) ns and more than the bucket
 * before.  Rounded up, because the upper bound of a bucket in Prometheus is inclusive.  The last
 * bucket holds the rest.  From 1.024 µs to 17.2 s.
 */
#define FIRST_BUCKET 10
#define BUCKETS 26

struct histogram {
	__u64 buckets[BUCKETS];
	__u64 sum;
};

static __always_inline __u32 bucket_of(__u64 ns)
{
	__u32 above, bits = 0;

	if (ns <= 1ULL << FIRST_BUCKET)
		return 0;
	if (ns > 1ULL << (FIRST_BUCKET + BUCKETS - 2))
		return BUCKETS - 1;
	above = (ns - 1) >> FIRST_BUCKET;
	if (above >> 16) {
		above >>= 16;
		bits += 16;
	}
	if (above >> 8) {
		above >>= 8;
		bits += 8;
	}
	if (above >> 4) {
		above >>= 4;
		bits += 4;
	}
	if (above >> 2) {
		above >>= 2;
		bits += 2;
	}
	bits += 1 + (above >> 1);
	return bits;
}

/* Added atomically: a program may be preempted by itself (Linux 7 runs them with preemption on). */
static __always_inline void record(struct histogram *histogram, __u64 ns)
{
	__u32 bucket = bucket_of(ns);

	if (bucket >= BUCKETS) /* cannot be; the verifier wants to see it */
		return;
	__sync_fetch_and_add(&histogram->buckets[bucket], 1);
	__sync_fetch_and_add(&histogram->sum, ns);
}

/* The same where interrupts are off. */
static __always_inline void record_alone(struct histogram *histogram, __u64 ns)
{
	__u32 bucket = bucket_of(ns);

	if (bucket >= BUCKETS)
		return;
	histogram->buckets[bucket]++;
	histogram->sum += ns;
}

/*
 * A counter that the kernel keeps for each thread: how much it has grown since it was last taken
 * over.  Two processors may ask at once; only one of them gets the growth.  What was taken is read
 * before what there is, so the difference is never negative.
 */
#define take_growth(taken, counter)                                                  \
	({                                                                           \
		__u64 __before = *(volatile __u64 *)(taken), __now = (counter);      \
		__u64 __grown = 0;                                                   \
		if ((__s64)(__now - __before) > 0 &&                                 \
		    __sync_val_compare_and_swap(taken, __before, __now) == __before) \
			__grown = __now - __before;                                  \
		__grown;                                                             \
	})

char LICENSE[] SEC("license") = "GPL";
