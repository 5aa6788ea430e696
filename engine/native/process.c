/* A process's own affairs: the end of its owner, and its name. */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <unistd.h>

static void *watch(void *argument) {
    struct pollfd gone = {.fd = (int)(intptr_t)argument, .events = POLLIN};
    while (poll(&gone, 1, -1) < 0 && errno == EINTR) {}
    /* Also when polling failed: a process that can't see its owner any more must not outlive it. */
    _exit(0);
}

/* Ends this process at once when `fd` (a pidfd, or a pipe that the watched process holds open) becomes readable. A native
 * thread, so that neither a busy interpreter nor a held lock delays it. A forked child needs a watch of its own. Not
 * PR_SET_PDEATHSIG: that follows the thread that forked, which is the keeper's and not the control process's. 0 or -errno. */
int ds_watch(int fd) {
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3); /* the caller may close its copy */
    if (own < 0) return -errno;
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 << 10); /* a library's thread-local data is taken from it too */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the interpreter's threads */
    int failed = pthread_create(&thread, &attributes, watch, (void *)(intptr_t)own);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (failed) close(own);
    return -failed;
}

/* The name that ps, top and /proc show; 15 bytes of it count. */
void ds_set_name(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }
