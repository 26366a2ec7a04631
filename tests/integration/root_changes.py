"""Programs for the containers of the tests of roots: CHANGE does what a busy container does to its root, LOOK tells all of it.

Both run as `python3 -c PROGRAM` in the test image, which has Debian's Python.
"""

from __future__ import annotations

CHANGE = r"""
import os, shutil, socket, stat
lib = "/usr/lib/python3.11/"
open("/etc/marker", "w").write("changed by the container\n")
os.unlink("/etc/group")
os.chmod("/etc/passwd", 0o640)
shutil.rmtree(lib + "wsgiref")
os.mkdir(lib + "wsgiref", 0o750)
open(lib + "wsgiref/new.py", "w").write("made again\n")
shutil.rmtree(lib + "curses")
open(lib + "curses", "w").write("a file where a directory was\n")
os.unlink(lib + "antigravity.py")
os.mkdir(lib + "antigravity.py")
open(lib + "antigravity.py/inside", "w").write("a directory where a file was\n")
# The same length and time, another content.
times = os.stat(lib + "this.py")
text = open(lib + "this.py").read()
open(lib + "this.py", "w").write(text[::-1])
os.utime(lib + "this.py", ns=(times.st_atime_ns, times.st_mtime_ns))
os.link(lib + "abc.py", "/data/abc-linked.py")
os.rename(lib + "webbrowser.py", "/data/moved.py")
open("/data/one", "w").write("two names")
os.link("/data/one", "/data/other")
with open("/data/sparse", "wb") as sparse:
    sparse.seek(8 << 20)
    sparse.write(b"middle")
    sparse.truncate(256 << 20)
os.symlink("/etc/../nowhere/" + "x" * 150, "/data/link")
os.mkfifo("/data/fifo", 0o620)
server = socket.socket(socket.AF_UNIX)
server.bind("/data/socket-of-nobody")
os.chown("/data/socket-of-nobody", 7, 8)
server.close()
open("/data/owned", "w").write("program")
os.chown("/data/owned", 1000, 1000)
os.chmod("/data/owned", 0o6755)
os.setxattr("/data/owned", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
try:
    os.setxattr("/data/owned", "user.note", b"\x00\xff=\n1")
except OSError:
    pass
os.utime("/data/owned", ns=(1, 1_234_567_890_123_456_789))
os.makedirs("/data/deep/" + "d" * 120 + "/" + "e" * 120)
open(b"/data/deep/not-utf8-\xff\xfe", "w").write("raw")
os.makedirs("/data/many")
for number in range(300):
    open(f"/data/many/{number}", "w").write(str(number))
for name, kind, device in (("null", stat.S_IFCHR, (1, 3)), ("disk", stat.S_IFBLK, (8, 0))):
    try:
        os.mknod("/data/" + name, kind | 0o666, os.makedev(*device))
    except PermissionError:
        pass
os.utime("/data", ns=(5, 10**18 + 5))
"""

LOOK = r"""
import hashlib, json, os, stat
seen, inodes = {}, {}
for top in ("/etc", "/usr", "/data", "/var", "/app"):
    for base, directories, files in os.walk(top):
        for name in [".", *directories, *files] if base == top else [*directories, *files]:
            path = os.path.join(base, name)
            status = os.lstat(path)
            if path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/etc/."):
                continue
            content = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                content = [os.major(status.st_rdev), os.minor(status.st_rdev)]
            elif stat.S_ISREG(status.st_mode):
                content = [status.st_size]
                if status.st_size < 4 << 20:
                    content.append(hashlib.sha256(open(path, "rb").read()).hexdigest())
                if status.st_nlink > 1:
                    inodes.setdefault(status.st_ino, []).append(path)
            keys = os.listxattr(path, follow_symlinks=False)
            attributes = {key: os.getxattr(path, key, follow_symlinks=False).hex() for key in keys}
            shown = os.fsencode(path).decode("latin-1")
            seen[shown] = [status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, content, attributes]
seen["hard links"] = sorted(sorted(names) for names in inodes.values() if len(names) > 1)
print(json.dumps(seen))
"""
