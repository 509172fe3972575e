// SPDX-License-Identifier: Apache-2.0
/*
 * Nanoseconds of processor time for a context switch with the wake-up before it: two processes on
 * one CPU pass a byte back and forth.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS 4000

static double cpu_ns(int who)
{
	struct rusage r;

	getrusage(who, &r);
	return (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1e9 +
	       (r.ru_utime.tv_usec + r.ru_stime.tv_usec) * 1e3;
}

int main(void)
{
	int there[2], back[2];
	double began;
	char byte = 0;

	if (pipe(there) || pipe(back))
		return 1;
	if (!fork()) {
		for (int i = 0; i < ROUNDS; i++)
			if (read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
				_exit(1);
		_exit(0);
	}
	began = cpu_ns(RUSAGE_SELF);
	for (int i = 0; i < ROUNDS; i++)
		if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
			return 1;
	wait(NULL);
	printf("%.1f\n", (cpu_ns(RUSAGE_SELF) - began + cpu_ns(RUSAGE_CHILDREN)) / (2 * ROUNDS));
	return 0;
}
