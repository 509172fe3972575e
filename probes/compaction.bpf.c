// SPDX-License-Identifier: GPL-2.0-only
/* Time that threads spend in moving pages together before they get a huge one: direct compaction. */
#include "probe.h"

COUNTERS(compactions, __u64, struct histogram, 4096);
PER_THREAD(began, __u64);

static const struct histogram none;

SEC("tp_btf/mm_compaction_begin")
int zone_begin(void *ctx)
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

SEC("tp_btf/mm_compaction_end")
int zone_end(void *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 *at = bpf_task_storage_get(&began, task, 0, 0);
	struct histogram *histogram;

	if (!at || !*at)
		return 0;
	histogram = counters_of_group(&compactions, task, &none);
	if (histogram)
		record(histogram, bpf_ktime_get_ns() - *at);
	*at = 0;
	return 0;
}
