// SPDX-License-Identifier: GPL-2.0-only
/* Time that threads spend in reclaiming memory before they get any: direct reclaim. */
#include "probe.h"

enum limit { LIMIT_MACHINE, LIMIT_CGROUP };

struct key {
	__u64 cgroup;
	__u64 limit;
};

struct reclaim {
	struct histogram time;
	__u64 pages;
};

COUNTERS(reclaims, struct key, struct reclaim, 4096);
PER_THREAD(began, __u64);

static const struct reclaim none;

static __always_inline int begin(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 *at;

	if (!stalled(task))
		return 0;
	at = bpf_task_storage_get(&began, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (at)
		*at = bpf_ktime_get_ns();
	else
		count_lost();
	return 0;
}

static __always_inline int end(enum limit limit, unsigned long pages)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct key key = { .cgroup = cgroup_of(task), .limit = limit };
	__u64 *at = bpf_task_storage_get(&began, task, 0, 0);
	struct reclaim *counters;

	if (!at || !*at) /* it is not stalled, or was before we were here */
		return 0;
	counters = counters_of(&reclaims, &key, &none, task);
	if (counters) {
		record(&counters->time, bpf_ktime_get_ns() - *at);
		__sync_fetch_and_add(&counters->pages, pages);
	}
	*at = 0;
	return 0;
}

SEC("tp_btf/mm_vmscan_direct_reclaim_begin")
int direct_begin(void *ctx)
{
	return begin();
}

SEC("tp_btf/mm_vmscan_direct_reclaim_end")
int BPF_PROG(direct_end, unsigned long nr_reclaimed)
{
	return end(LIMIT_MACHINE, nr_reclaimed);
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_begin")
int cgroup_begin(void *ctx)
{
	return begin();
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_end")
int BPF_PROG(cgroup_end, unsigned long nr_reclaimed)
{
	return end(LIMIT_CGROUP, nr_reclaimed);
}
