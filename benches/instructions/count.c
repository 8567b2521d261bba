/* A plugin for QEMU's user emulation that prints the number of instructions a program has executed. QEMU documents the interface in
 * docs/devel/tcg-plugins.rst; Debian packages none of its headers, so the declarations are repeated here. */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);

#define EXPORT __attribute__((visibility("default")))
#define ADD 0

EXPORT int qemu_plugin_version = 1;
static uint64_t count;

static void count_block(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD, &count, qemu_plugin_tb_n_insns(block));
}

static void print_count(plugin_id id, void *userdata)
{
    (void)id, (void)userdata;
    fprintf(stderr, "Collected : %" PRIu64 "\n", count);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int arguments, char **values)
{
    (void)info, (void)arguments, (void)values;
    qemu_plugin_register_vcpu_tb_trans_cb(id, count_block);
    qemu_plugin_register_atexit_cb(id, print_count, NULL);
    return 0;
}
