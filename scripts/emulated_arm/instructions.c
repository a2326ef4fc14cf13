/* Plugin of qemu's user-mode emulation: counts guest instructions between pairs of marks.
 *
 * A mark is the system call getppid (Python: os.getppid()), which no runtime makes for itself. The first one starts a
 * count, the second one ends it and writes the number and a newline to the file that the environment variable
 * ESPALIER_INSTRUCTIONS names, the third one starts anew. Each thread counts for itself: a count is that of the thread
 * that made both marks.
 *
 * The declarations are those that are needed of qemu's plugin interface (its documentation: "QEMU TCG Plugins"), whose
 * header is in no package of Debian. PLUGIN_API is the version of the interface that the qemu at hand wants.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define GETPPID 173 /* on aarch64 */
#define NO_REGISTERS 0

typedef uint64_t plugin_id;
struct qemu_plugin_tb; /* a block of instructions that is translated, and executed, as one */
typedef void on_block(unsigned int vcpu, void *instructions);
typedef void on_translation(plugin_id id, struct qemu_plugin_tb *block);
typedef void on_system_call(plugin_id id, unsigned int vcpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t,
                            uint64_t, uint64_t, uint64_t, uint64_t);

extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *block, on_block *, int flags, void *data);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, on_translation *);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, on_system_call *);

EXPORT int qemu_plugin_version = PLUGIN_API;

/* In user mode a virtual CPU is a thread. */
static __thread uint64_t executed;
static __thread bool counting;

static void count(unsigned int vcpu, void *instructions)
{
    (void)vcpu;
    executed += (uintptr_t)instructions;
}

static void translate(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, count, NO_REGISTERS, (void *)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void store(uint64_t instructions)
{
    const char *path = getenv("ESPALIER_INSTRUCTIONS");
    FILE *file = path ? fopen(path, "w") : NULL;
    bool written = file && fprintf(file, "%" PRIu64 "\n", instructions) > 0;
    if (file && fclose(file) != 0)
        written = false;
    if (!written) {
        fprintf(stderr, "error: the count cannot be written: ESPALIER_INSTRUCTIONS must name a file in a folder that "
                        "exists, it is %s\n", path ? path : "not set");
        _Exit(2);
    }
}

static void mark(plugin_id id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                 uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)vcpu, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != GETPPID)
        return;
    if (counting)
        store(executed);
    counting = !counting;
    executed = 0;
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_vcpu_syscall_cb(id, mark);
    return 0;
}
