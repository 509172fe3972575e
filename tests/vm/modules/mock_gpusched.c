// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two rings without hardware on the real DRM GPU scheduler, so that its tracepoints fire.
 *
 *   echo "JOBS MICROSECONDS [RING]" >/dev/mock_gpu
 *
 * submits JOBS jobs that each keep the ring (0 gfx_0.0.0, 1 comp_1.0.0) busy for at least
 * MICROSECONDS, and returns when the last has finished.  Every opener has a queue of its own.
 */
#include <drm/gpu_scheduler.h>
#include <linux/cleanup.h>
#include <linux/delay.h>
#include <linux/dma-fence.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define MAX_JOBS	1000000
#define MAX_USEC	10000000
#define CREDITS		64	/* jobs in the ring at once */

struct mock_ring {
	const char *name;
	struct drm_gpu_scheduler sched;
	struct workqueue_struct *hardware;	/* one job at a time */
	u64 fence_context;
	atomic_t fence_seqno;
};

static struct mock_ring rings[] = {
	{ .name = "gfx_0.0.0" },
	{ .name = "comp_1.0.0" },
};

static struct platform_device *device;

struct mock_job {
	struct drm_sched_job base;
	unsigned int usec;
};

struct mock_client {
	struct mutex lock;
	struct drm_sched_entity entities[ARRAY_SIZE(rings)];
};

/* What the hardware works on: it outlives the job, which is freed when the fence signals. */
struct mock_work {
	struct dma_fence fence;
	spinlock_t lock;
	struct work_struct work;
	unsigned int usec;
};

static const char *fence_driver_name(struct dma_fence *fence)
{
	return "mock_gpusched";
}

static const char *fence_timeline_name(struct dma_fence *fence)
{
	return "mock_ring";
}

static const struct dma_fence_ops fence_ops = {
	.get_driver_name = fence_driver_name,
	.get_timeline_name = fence_timeline_name,
};

static void hardware_works(struct work_struct *work)
{
	struct mock_work *mock = container_of(work, struct mock_work, work);

	if (mock->usec)
		usleep_range(mock->usec, mock->usec + mock->usec / 10 + 1);
	dma_fence_signal(&mock->fence);
	dma_fence_put(&mock->fence);
}

static struct dma_fence *run_job(struct drm_sched_job *base)
{
	struct mock_ring *ring = container_of(base->sched, struct mock_ring, sched);
	struct mock_work *mock = kzalloc(sizeof(*mock), GFP_KERNEL);

	if (!mock)
		return ERR_PTR(-ENOMEM);
	spin_lock_init(&mock->lock);
	INIT_WORK(&mock->work, hardware_works);
	mock->usec = container_of(base, struct mock_job, base)->usec;
	dma_fence_init(&mock->fence, &fence_ops, &mock->lock, ring->fence_context,
		       atomic_inc_return(&ring->fence_seqno));
	dma_fence_get(&mock->fence);
	queue_work(ring->hardware, &mock->work);
	return &mock->fence;
}

static enum drm_gpu_sched_stat timedout_job(struct drm_sched_job *job)
{
#ifdef STAT_IS_RESET
	return DRM_GPU_SCHED_STAT_RESET;
#else
	return DRM_GPU_SCHED_STAT_NOMINAL;
#endif
}

static void free_job(struct drm_sched_job *base)
{
	drm_sched_job_cleanup(base);
	kfree(container_of(base, struct mock_job, base));
}

static const struct drm_sched_backend_ops sched_ops = {
	.run_job = run_job,
	.timedout_job = timedout_job,
	.free_job = free_job,
};

/* Submit one job; its fence of completion, or an error. */
static struct dma_fence *submit(struct mock_client *client, unsigned int ring, unsigned int usec)
{
	struct mock_job *job = kzalloc(sizeof(*job), GFP_KERNEL);
	struct dma_fence *finished;
	int error;

	if (!job)
		return ERR_PTR(-ENOMEM);
	job->usec = usec;
#ifdef JOB_HAS_CLIENT_ID
	error = drm_sched_job_init(&job->base, &client->entities[ring], 1, client,
				   task_tgid_nr(current));
#else
	error = drm_sched_job_init(&job->base, &client->entities[ring], 1, client);
#endif
	if (error) {
		kfree(job);
		return ERR_PTR(error);
	}
	drm_sched_job_arm(&job->base);
	finished = dma_fence_get(&job->base.s_fence->finished);
	drm_sched_entity_push_job(&job->base);
	return finished;
}

static ssize_t client_write(struct file *file, const char __user *from, size_t count, loff_t *pos)
{
	struct mock_client *client = file->private_data;
	unsigned int jobs, usec, ring = 0;
	struct dma_fence *last = NULL;
	char text[64] = "";
	long error = 0;

	if (count >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, from, count))
		return -EFAULT;
	if (sscanf(text, "%u %u %u", &jobs, &usec, &ring) < 2 || !jobs || jobs > MAX_JOBS ||
	    usec > MAX_USEC || ring >= ARRAY_SIZE(rings))
		return -EINVAL;
	scoped_guard(mutex, &client->lock) {
		while (jobs--) {
			struct dma_fence *fence = submit(client, ring, usec);

			if (IS_ERR(fence)) {
				error = PTR_ERR(fence);
				break;
			}
			dma_fence_put(last);
			last = fence;
		}
	}
	if (last) {
		long waited = dma_fence_wait(last, true);

		error = error ?: waited;
		dma_fence_put(last);
	}
	return error ?: count;
}

static int client_open(struct inode *inode, struct file *file)
{
	struct mock_client *client = kzalloc(sizeof(*client), GFP_KERNEL);
	int error, i;

	if (!client)
		return -ENOMEM;
	mutex_init(&client->lock);
	for (i = 0; i < ARRAY_SIZE(rings); i++) {
		struct drm_gpu_scheduler *sched = &rings[i].sched;

		error = drm_sched_entity_init(&client->entities[i], DRM_SCHED_PRIORITY_NORMAL,
					      &sched, 1, NULL);
		if (error)
			goto undo;
	}
	file->private_data = client;
	return 0;
undo:
	while (i--)
		drm_sched_entity_destroy(&client->entities[i]);
	kfree(client);
	return error;
}

static int client_release(struct inode *inode, struct file *file)
{
	struct mock_client *client = file->private_data;
	int i;

	for (i = 0; i < ARRAY_SIZE(rings); i++)
		drm_sched_entity_destroy(&client->entities[i]);
	kfree(client);
	return 0;
}

static const struct file_operations client_ops = {
	.owner = THIS_MODULE,
	.open = client_open,
	.release = client_release,
	.write = client_write,
};

static struct miscdevice misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "mock_gpu",
	.mode = 0666,
	.fops = &client_ops,
};

static int ring_init(struct mock_ring *ring)
{
#ifdef SCHED_HAS_INIT_ARGS
	const struct drm_sched_init_args args = {
		.ops = &sched_ops,
		.num_rqs = DRM_SCHED_PRIORITY_COUNT,
		.credit_limit = CREDITS,
		.timeout = MAX_SCHEDULE_TIMEOUT,
		.name = ring->name,
		.dev = &device->dev,
	};
#endif
	int error;

	ring->fence_context = dma_fence_context_alloc(1);
	ring->hardware = alloc_ordered_workqueue("mock_%s", 0, ring->name);
	if (!ring->hardware)
		return -ENOMEM;
#ifdef SCHED_HAS_INIT_ARGS
	error = drm_sched_init(&ring->sched, &args);
#else
	error = drm_sched_init(&ring->sched, &sched_ops, NULL, DRM_SCHED_PRIORITY_COUNT, CREDITS,
			       0, MAX_SCHEDULE_TIMEOUT, NULL, NULL, ring->name, &device->dev);
#endif
	if (error)
		destroy_workqueue(ring->hardware);
	return error;
}

static void rings_fini(int count)
{
	while (count--) {
		drm_sched_fini(&rings[count].sched);
		destroy_workqueue(rings[count].hardware);
	}
}

static int __init mock_gpusched_init(void)
{
	int error, i;

	device = platform_device_register_simple("mock_gpu", PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(device))
		return PTR_ERR(device);
	for (i = 0; i < ARRAY_SIZE(rings); i++) {
		error = ring_init(&rings[i]);
		if (error)
			goto undo;
	}
	error = misc_register(&misc);
	if (error)
		goto undo;
	return 0;
undo:
	rings_fini(i);
	platform_device_unregister(device);
	return error;
}

static void __exit mock_gpusched_exit(void)
{
	misc_deregister(&misc);
	rings_fini(ARRAY_SIZE(rings));
	rcu_barrier();	/* the scheduler frees its fences from RCU */
	platform_device_unregister(device);
}

module_init(mock_gpusched_init);
module_exit(mock_gpusched_exit);
MODULE_DESCRIPTION("GPU rings without hardware on the DRM scheduler, for tests");
MODULE_LICENSE("GPL");
