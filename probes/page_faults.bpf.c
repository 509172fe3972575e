// SPDX-License-Identifier: GPL-2.0-only
/*
 * Page faults per control group, at no cost to a fault.
 *
 * The kernel counts the faults of each thread, minor and major apart (min_flt and maj_flt, what
 * getrusage(2) adds up).  Here they are taken over, not counted a second time: from a thread that
 * ends, and from all threads when somebody asks.
 */
#include "probe.h"

struct faults {
	__u64 minor;
	__u64 major;
};

COUNTERS(faults, __u64, struct faults, 4096);
PER_THREAD(taken, struct faults);

static const struct faults none;

static __always_inline void take(struct task_struct *task, struct faults *then)
{
	struct faults *total;

	if (then->minor == task->min_flt && then->major == task->maj_flt)
		return;
	total = counters_of_group(&faults, task, &none);
	if (!total) /* nothing was taken: while the thread lives, nothing is lost either */
		return;
	__sync_fetch_and_add(&total->minor, take_growth(&then->minor, task->min_flt));
	__sync_fetch_and_add(&total->major, take_growth(&then->major, task->maj_flt));
}

/* Once, before anything is counted: what threads did before is not taken over. */
SEC("iter/task")
int threads_before(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct faults *then;

	if (!task || task->flags & PF_KTHREAD)
		return 0;
	then = bpf_task_storage_get(&taken, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (then) {
		then->minor = task->min_flt;
		then->major = task->maj_flt;
	}
	return 0;
}

SEC("iter/task")
int threads_now(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct faults *then;

	if (!task || task->flags & (PF_KTHREAD | PF_EXITING))
		return 0;
	then = bpf_task_storage_get(&taken, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!then)
		count_lost();
	else if (!(task->flags & PF_EXITING)) /* else thread_exit may have found no storage */
		take(task, then);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(thread_exit, struct task_struct *task)
{
	struct faults nothing = {}, *then;

	if (task->flags & PF_KTHREAD)
		return 0;
	/* Not created: most threads end without having been visited. */
	then = bpf_task_storage_get(&taken, task, 0, 0);
	take(task, then ?: &nothing);
	return 0;
}
