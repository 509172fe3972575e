// SPDX-License-Identifier: GPL-2.0-only
/*
 * A cpufreq driver without hardware, for tests of what user space does with it.
 *
 *   modprobe mock_cpufreq        "mock-cpufreq": a frequency table and every governor
 *   modprobe mock_cpufreq epp=1  "amd-pstate-epp", as amd-pstate in active mode: the two
 *                                policies performance and powersave, and a preference that
 *                                is locked under performance
 *
 * Semantics of the second after Documentation/admin-guide/pm/amd-pstate.rst and
 * drivers/cpufreq/amd-pstate.c: a preference other than performance is refused with EBUSY
 * while the policy is performance, an unknown one with EINVAL, and setting the policy
 * performance sets the preference too.
 */
#include <linux/cpufreq.h>
#include <linux/module.h>
#include <linux/string.h>

#define LOWEST_KHZ	625000
#define NOMINAL_KHZ	2000000
#define HIGHEST_KHZ	5100000

static bool epp;
module_param(epp, bool, 0444);
MODULE_PARM_DESC(epp, "look like amd-pstate in active mode");

static struct cpufreq_frequency_table table[] = {
	{ .frequency = LOWEST_KHZ },
	{ .frequency = NOMINAL_KHZ },
	{ .frequency = HIGHEST_KHZ },
	{ .frequency = CPUFREQ_TABLE_END },
};

enum preference { DEFAULT, PERFORMANCE, BALANCE_PERFORMANCE, BALANCE_POWER, POWER };

static const char * const preference_names[] = {
	[DEFAULT] = "default",
	[PERFORMANCE] = "performance",
	[BALANCE_PERFORMANCE] = "balance_performance",
	[BALANCE_POWER] = "balance_power",
	[POWER] = "power",
};

struct mock_cpu {
	unsigned int khz;
	enum preference preference;
};

static struct mock_cpu cpus[NR_CPUS];

static unsigned int mock_get(unsigned int cpu)
{
	return cpus[cpu].khz;
}

static int table_init(struct cpufreq_policy *policy)
{
	policy->cpuinfo.transition_latency = 20 * NSEC_PER_USEC;
	policy->freq_table = table;
	policy->cur = NOMINAL_KHZ;
	cpus[policy->cpu].khz = NOMINAL_KHZ;
	return 0;
}

static int table_target(struct cpufreq_policy *policy, unsigned int index)
{
	cpus[policy->cpu].khz = table[index].frequency;
	policy->cur = table[index].frequency;
	return 0;
}

static struct cpufreq_driver table_driver = {
	.name = "mock-cpufreq",
	/*
	 * Without transition notifiers: from them the kernel would conclude that the TSC
	 * changes with the frequency, and drop it as a clock.
	 */
	.flags = CPUFREQ_CONST_LOOPS | CPUFREQ_ASYNC_NOTIFICATION,
	.init = table_init,
	.verify = cpufreq_generic_frequency_table_verify,
	.target_index = table_target,
	.get = mock_get,
};

static int epp_init(struct cpufreq_policy *policy)
{
	policy->cpuinfo.min_freq = LOWEST_KHZ;
	policy->cpuinfo.max_freq = HIGHEST_KHZ;
	policy->min = LOWEST_KHZ;
	policy->max = HIGHEST_KHZ;
	policy->policy = CPUFREQ_POLICY_POWERSAVE;
	cpus[policy->cpu].khz = NOMINAL_KHZ;
	cpus[policy->cpu].preference = BALANCE_PERFORMANCE;
	return 0;
}

static int epp_verify(struct cpufreq_policy_data *policy)
{
	cpufreq_verify_within_cpu_limits(policy);
	return 0;
}

static int epp_set_policy(struct cpufreq_policy *policy)
{
	struct mock_cpu *cpu = &cpus[policy->cpu];
	bool performance = policy->policy == CPUFREQ_POLICY_PERFORMANCE;

	cpu->khz = performance ? policy->max : policy->min;
	if (performance)
		cpu->preference = PERFORMANCE;
	return 0;
}

static ssize_t show_energy_performance_preference(struct cpufreq_policy *policy, char *buf)
{
	return sysfs_emit(buf, "%s\n", preference_names[cpus[policy->cpu].preference]);
}

static ssize_t store_energy_performance_preference(struct cpufreq_policy *policy,
						   const char *buf, size_t count)
{
	int preference = sysfs_match_string(preference_names, buf);

	if (preference < 0)
		return preference;
	if (policy->policy == CPUFREQ_POLICY_PERFORMANCE && preference != PERFORMANCE)
		return -EBUSY;
	cpus[policy->cpu].preference = preference;
	return count;
}

static ssize_t show_energy_performance_available_preferences(struct cpufreq_policy *policy,
							     char *buf)
{
	int i, size = 0;

	for (i = 0; i < ARRAY_SIZE(preference_names); i++)
		size += sysfs_emit_at(buf, size, "%s ", preference_names[i]);
	return size + sysfs_emit_at(buf, size, "\n");
}

cpufreq_freq_attr_rw(energy_performance_preference);
cpufreq_freq_attr_ro(energy_performance_available_preferences);

static struct freq_attr *epp_attributes[] = {
	&energy_performance_preference,
	&energy_performance_available_preferences,
	NULL,
};

static struct cpufreq_driver epp_driver = {
	.name = "amd-pstate-epp",
	.flags = CPUFREQ_CONST_LOOPS,
	.init = epp_init,
	.verify = epp_verify,
	.setpolicy = epp_set_policy,
	.get = mock_get,
	.attr = epp_attributes,
};

static struct cpufreq_driver *driver(void)
{
	return epp ? &epp_driver : &table_driver;
}

static int __init mock_cpufreq_init(void)
{
	return cpufreq_register_driver(driver());
}

static void __exit mock_cpufreq_exit(void)
{
	cpufreq_unregister_driver(driver());
}

module_init(mock_cpufreq_init);
module_exit(mock_cpufreq_exit);
MODULE_DESCRIPTION("cpufreq driver without hardware, for tests");
MODULE_LICENSE("GPL");
