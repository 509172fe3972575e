// SPDX-License-Identifier: GPL-2.0-only
/*
 * Jobs on the rings of a GPU: how many, how long they waited in the queue, how long on the ring.
 *
 * The scheduler's tracepoints were renamed in Linux 6.17; their argument is a job in both
 * generations.  A job is known by its fence; a pointer is enough, it is not reused while the job
 * lives.  How it ends is not told by the scheduler's tracepoint, which has no event for jobs of a
 * process that was killed and knows no error yet, but by the fence that is signaled then.
 *
 * gpu_sched is a module: its types are in BTF of its own, and a program that attaches by BTF
 * would need CAP_SYS_ADMIN.  So these attach by name.
 */
#include "probe.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kobject {
	const char *name;
};

struct device {
	struct kobject kobj;
	const char *init_name;
};

struct drm_gpu_scheduler {
	const char *name;
	struct device *dev;
};

struct dma_fence {
	int error;
};

struct drm_sched_fence {
	struct dma_fence finished;
};

struct drm_sched_job {
	struct drm_gpu_scheduler *sched;
	struct drm_sched_fence *s_fence;
};

#pragma clang attribute pop

struct key {
	char pci_address[32];
	char ring[32];
	__u64 cgroup;
};

struct job {
	struct key key;
	__u64 queued_at;
	__u64 run_at;
};

struct jobs {
	__u64 queued;
	__u64 run;
	__u64 done;
	__u64 failed;
	__s64 in_flight;
	struct histogram wait;
	struct histogram busy;
};

COUNTERS(jobs, struct key, struct jobs, 1024);

/* Jobs between queue and end, by their fence. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct job);
} in_flight SEC(".maps");

static const struct jobs none;

static __always_inline void ended(struct job *job, bool failed)
{
	struct jobs *counters = bpf_map_lookup_elem(&jobs, &job->key);

	if (!counters)
		return;
	__sync_fetch_and_add(&counters->in_flight, -1);
	if (failed)
		__sync_fetch_and_add(&counters->failed, 1);
	else
		__sync_fetch_and_add(&counters->done, 1);
	if (job->run_at)
		record(&counters->busy, bpf_ktime_get_ns() - job->run_at);
}

/* In the thread that submits, so its control group is known. */
static __always_inline int queued(struct drm_sched_job *submitted)
{
	struct drm_gpu_scheduler *sched = BPF_CORE_READ(submitted, sched);
	__u64 fence = (__u64)BPF_CORE_READ(submitted, s_fence);
	struct device *device = BPF_CORE_READ(sched, dev);
	struct task_struct *task = bpf_get_current_task_btf();
	struct job job = {}, *stale;
	struct jobs *counters;
	const char *name;

	bpf_probe_read_kernel_str(job.key.ring, sizeof(job.key.ring), BPF_CORE_READ(sched, name));
	if (device) {
		/* as dev_name() does */
		name = BPF_CORE_READ(device, init_name);
		if (!name)
			name = BPF_CORE_READ(device, kobj.name);
		bpf_probe_read_kernel_str(job.key.pci_address, sizeof(job.key.pci_address), name);
	}
	job.key.cgroup = cgroup_of(task);
	job.queued_at = bpf_ktime_get_ns();

	stale = bpf_map_lookup_elem(&in_flight, &fence);
	if (stale) /* it ended unseen, and its fence is used again */
		ended(stale, 1);
	counters = counters_of(&jobs, &job.key, &none, task);
	if (!counters)
		return 0;
	if (bpf_map_update_elem(&in_flight, &fence, &job, BPF_ANY)) {
		count_lost();
		return 0;
	}
	__sync_fetch_and_add(&counters->queued, 1);
	__sync_fetch_and_add(&counters->in_flight, 1);
	return 0;
}

static __always_inline int running(struct drm_sched_job *job)
{
	__u64 fence = (__u64)BPF_CORE_READ(job, s_fence);
	struct job *known = bpf_map_lookup_elem(&in_flight, &fence);
	struct jobs *counters;

	if (!known || known->run_at) /* queued before we were here; run again after a reset */
		return 0;
	known->run_at = bpf_ktime_get_ns();
	counters = bpf_map_lookup_elem(&jobs, &known->key);
	if (counters) {
		__sync_fetch_and_add(&counters->run, 1);
		record(&counters->wait, known->run_at - known->queued_at);
	}
	return 0;
}

/* Of any driver; those that are not in our map are none of ours. */
SEC("raw_tp/dma_fence_signaled")
int BPF_PROG(fence_signaled, struct dma_fence *signaled)
{
	__u64 fence = (__u64)signaled - bpf_core_field_offset(struct drm_sched_fence, finished);
	struct job *known = bpf_map_lookup_elem(&in_flight, &fence);

	if (known) {
		ended(known, BPF_CORE_READ(signaled, error) != 0);
		bpf_map_delete_elem(&in_flight, &fence);
	}
	return 0;
}

/* Linux 6.17 and later */
SEC("raw_tp/drm_sched_job_queue")
int BPF_PROG(job_queue, struct drm_sched_job *job)
{
	return queued(job);
}

SEC("raw_tp/drm_sched_job_run")
int BPF_PROG(job_run, struct drm_sched_job *job)
{
	return running(job);
}

/* before */
SEC("raw_tp/drm_sched_job")
int BPF_PROG(job_queue_616, struct drm_sched_job *job)
{
	return queued(job);
}

SEC("raw_tp/drm_run_job")
int BPF_PROG(job_run_616, struct drm_sched_job *job)
{
	return running(job);
}
