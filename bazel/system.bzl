"""Repositories for headers and static libraries that the system has installed."""

# The folders where Debian and other distributions keep headers and archives. The first folder that has a file wins.
_INCLUDE_FOLDERS = ["/usr/local/include", "/usr/include"]
_LIBRARY_FOLDERS = [
    "/usr/local/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
]

def _link(ctx, name, folders, place):
    """Links the system's `name` to `place`/`name`, or fails with the package to install."""
    for folder in folders:
        path = ctx.path(folder + "/" + name)
        if path.exists:
            ctx.symlink(path, place + "/" + name)
            return
    fail("@{}: {} is in none of {}. Install {} (Debian: apt-get install {})".format(
        ctx.name,
        name,
        ", ".join(folders),
        ctx.name,
        ctx.attr.debian_package,
    ))

def _system_repository_impl(ctx):
    for header in ctx.attr.headers:
        _link(ctx, header, _INCLUDE_FOLDERS, "include")
    for archive in ctx.attr.archives:
        _link(ctx, archive, _LIBRARY_FOLDERS, "lib")
    imports = [
        'cc_import(name = "{0}", static_library = "lib/{0}")'.format(archive)
        for archive in ctx.attr.archives
    ]
    ctx.file("BUILD", """\
package(default_visibility = ["//visibility:public"])

{imports}

cc_library(
    name = "{name}",
    hdrs = glob(["include/**"]),
    includes = ["include"],
    linkopts = ["-pthread"],
    deps = {archives},
)
""".format(
        name = ctx.name,
        archives = [":" + archive for archive in ctx.attr.archives],
        imports = "\n".join(imports),
    ))

system_repository = repository_rule(
    implementation = _system_repository_impl,
    attrs = {
        "archives": attr.string_list(doc = "file names of static libraries, each before the ones that it needs"),
        "debian_package": attr.string(mandatory = True, doc = "the package that an error tells the user to install"),
        "headers": attr.string_list(mandatory = True, doc = "headers, or folders of headers"),
    },
    local = True,
    doc = "Defines @name//:name, a library of the system, with its headers as system headers and its archives.",
)
