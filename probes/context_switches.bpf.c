// SPDX-License-Identifier: GPL-2.0-only
/*
 * Context switches, run-queue latency, and what threads spend their time with.
 *
 * One program on the path of a context switch.  It needs none at wake-up: the kernel notes when a
 * thread was put into a run queue (sched_info.last_queued, in the clock of that queue), and
 * clears it only after this tracepoint.
 */
#include "probe.h"

struct switches {
	__u64 voluntary;
	__u64 involuntary;
	struct histogram latency;
};

struct times {
	__u64 running;
	__u64 waiting;
	__u64 blocked;
	__u64 migrations;
};

COUNTERS(switches, __u64, struct switches, 4096);
COUNTERS(threads, __u64, struct times, 4096);
PER_THREAD(taken, struct times);

static const struct switches no_switches;
static const struct times no_times;

/* prev_state: since Linux 5.18 an argument of the tracepoint.  Interrupts are off here. */
SEC("tp_btf/sched_switch")
int BPF_PROG(context_switch, bool preempt, struct task_struct *prev, struct task_struct *next,
	     unsigned int prev_state)
{
	struct switches *counters = 0;
	__u64 cgroup = 0, other, queued;
	__s64 waited;

	if (prev->pid) {
		cgroup = cgroup_of(prev);
		counters = counters_of(&switches, &cgroup, &no_switches);
		if (counters) {
			/* as __schedule() does for nvcsw and nivcsw */
			if (prev_state && !preempt)
				counters->voluntary++;
			else
				counters->involuntary++;
		}
	}
	if (!next->pid)
		return 0;
	queued = next->sched_info.last_queued;
	if (!queued)
		return 0;
	waited = next->se.cfs_rq->rq->clock - queued;
	if (waited < 0) /* it came from another processor, whose clock is a little ahead */
		waited = 0;
	other = cgroup_of(next);
	if (!counters || other != cgroup)
		counters = counters_of(&switches, &other, &no_switches);
	if (counters)
		record_alone(&counters->latency, waited);
	return 0;
}

/*
 * All the time of a thread that it neither ran nor waited for a processor.  As a sum that grows
 * with the clock it is right again as soon as the kernel has updated the other two.
 */
static __always_inline __u64 blocked_until(struct task_struct *task, __u64 now)
{
	return now - task->start_time - task->se.sum_exec_runtime - task->sched_info.run_delay;
}

static __always_inline void take(struct task_struct *task)
{
	struct times *then, *total;
	__u64 running, waiting, blocked, migrations;

	if (task->flags & PF_KTHREAD || task->exit_state)
		return;
	then = bpf_task_storage_get(&taken, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!then) {
		count_lost();
		return;
	}
	running = read_once(&then->running);
	waiting = read_once(&then->waiting);
	blocked = read_once(&then->blocked);
	migrations = read_once(&then->migrations);
	running = take_growth(&then->running, running, task->se.sum_exec_runtime);
	waiting = take_growth(&then->waiting, waiting, task->sched_info.run_delay);
	blocked = take_growth(&then->blocked, blocked, blocked_until(task, bpf_ktime_get_ns()));
	migrations = take_growth(&then->migrations, migrations, task->se.nr_migrations);
	total = counters_of_group(&threads, task, &no_times);
	if (!total)
		return;
	__sync_fetch_and_add(&total->running, running);
	__sync_fetch_and_add(&total->waiting, waiting);
	__sync_fetch_and_add(&total->blocked, blocked);
	__sync_fetch_and_add(&total->migrations, migrations);
}

/* Once, before anything is counted: what threads did before is not taken over. */
SEC("iter/task")
int threads_before(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct times *then;

	if (!task || task->flags & PF_KTHREAD)
		return 0;
	then = bpf_task_storage_get(&taken, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (then) {
		then->running = task->se.sum_exec_runtime;
		then->waiting = task->sched_info.run_delay;
		then->blocked = blocked_until(task, bpf_ktime_get_ns());
		then->migrations = task->se.nr_migrations;
	}
	return 0;
}

SEC("iter/task")
int threads_now(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;

	if (task)
		take(task);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(thread_exit, struct task_struct *task)
{
	take(task);
	return 0;
}
