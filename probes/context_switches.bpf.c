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
/*
 * What is known of a thread: made when it starts, so that no memory is asked for under the lock of
 * a run queue.
 */
struct thread {
	struct times taken;
	__u64 born; /* exec in a thread that is not the first gives it the start time of that one */
	__u64 delay; /* run_delay when it last got a processor */
};

COUNTERS(threads, __u64, struct times, 4096);
PER_THREAD(known, struct thread);

static const struct switches no_switches;
static const struct times no_times;

/*
 * All the time of a thread that it neither ran nor waited for a processor.  As a sum that grows
 * with the clock it is right again as soon as the kernel has updated the other two.
 */
static __always_inline __u64 blocked_until(struct task_struct *task, struct thread *thread,
					   __u64 now)
{
	return now - thread->born - task->se.sum_exec_runtime - task->sched_info.run_delay;
}

static __always_inline void take(struct task_struct *task, struct thread *thread)
{
	struct times *total = counters_of_group(&threads, task, &no_times);
	struct times *taken = &thread->taken;
	__u64 blocked;

	if (!total) /* nothing was taken: while the thread lives, nothing is lost either */
		return;
	if (!thread->born)
		thread->born = task->start_time;
	blocked = blocked_until(task, thread, bpf_ktime_get_ns());
	__sync_fetch_and_add(&total->running,
			     take_growth(&taken->running, task->se.sum_exec_runtime));
	__sync_fetch_and_add(&total->waiting,
			     take_growth(&taken->waiting, task->sched_info.run_delay));
	__sync_fetch_and_add(&total->blocked, take_growth(&taken->blocked, blocked));
	__sync_fetch_and_add(&total->migrations,
			     take_growth(&taken->migrations, task->se.nr_migrations));
}

/*
 * A thread has left the processor for good: only now has the kernel brought its run time up to
 * date, and the memory of its process was freed in that time.
 */
static __always_inline void last_switch(struct task_struct *task)
{
	struct thread unknown = {}, *thread;

	if (task->flags & PF_KTHREAD)
		return;
	thread = bpf_task_storage_get(&known, task, 0, 0);
	take(task, thread ?: &unknown);
}

/*
 * How long a thread waited that gets a processor now.  Where it was moved to another run queue
 * meanwhile, the kernel has added what it waited before to run_delay, and begun anew.
 */
static __always_inline __u64 waited_until(struct task_struct *next, __u64 queued)
{
	struct thread *thread = bpf_task_storage_get(&known, next, 0, 0);
	__u64 before = next->sched_info.run_delay;
	__u64 delay = before + next->se.cfs_rq->rq->clock - queued;
	__s64 waited;

	if (thread) {
		if (thread->delay)
			before = thread->delay;
		else if (!next->sched_info.pcount) /* it runs for the first time */
			before = 0;
		thread->delay = delay;
	}
	waited = delay - before;
	return waited > 0 ? waited : 0; /* the clock of another processor may be a little behind */
}

/* prev_state: since Linux 5.18 an argument of the tracepoint.  Interrupts are off here. */
SEC("tp_btf/sched_switch")
int BPF_PROG(context_switch, bool preempt, struct task_struct *prev, struct task_struct *next,
	     unsigned int prev_state)
{
	struct switches *counters = 0;
	__u64 cgroup = 0, other, queued, waited;

	if (prev->pid) {
		cgroup = cgroup_of(prev);
		counters = counters_of(&switches, &cgroup, &no_switches, prev);
		if (counters) {
			/* as __schedule() does for nvcsw and nivcsw */
			if (prev_state && !preempt)
				counters->voluntary++;
			else
				counters->involuntary++;
		}
		if (prev_state & TASK_DEAD)
			last_switch(prev);
	}
	if (!next->pid)
		return 0;
	queued = next->sched_info.last_queued;
	if (!queued)
		return 0;
	waited = waited_until(next, queued);
	other = cgroup_of(next);
	if (!counters || other != cgroup)
		counters = counters_of(&switches, &other, &no_switches, next);
	if (counters)
		record_alone(&counters->latency, waited);
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(thread_start, struct task_struct *parent, struct task_struct *task)
{
	struct thread *thread;

	if (task->flags & PF_KTHREAD)
		return 0;
	thread = bpf_task_storage_get(&known, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (thread)
		thread->born = task->start_time;
	return 0;
}

/* Once, before anything is counted: what threads did before is not taken over. */
SEC("iter/task")
int threads_before(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct thread *thread;

	if (!task || task->flags & PF_KTHREAD)
		return 0;
	thread = bpf_task_storage_get(&known, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (thread) {
		thread->born = task->start_time;
		thread->delay = task->sched_info.run_delay;
		thread->taken.running = task->se.sum_exec_runtime;
		thread->taken.waiting = task->sched_info.run_delay;
		thread->taken.blocked = blocked_until(task, thread, bpf_ktime_get_ns());
		thread->taken.migrations = task->se.nr_migrations;
	}
	return 0;
}

SEC("iter/task")
int threads_now(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct thread *thread;

	if (!task || task->flags & PF_KTHREAD || task->exit_state)
		return 0;
	thread = bpf_task_storage_get(&known, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!thread)
		count_lost();
	else if (!task->exit_state) /* else its last switch may have found no storage */
		take(task, thread);
	return 0;
}
