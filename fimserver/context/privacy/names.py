"""Recognise files that hold secrets by their names: they are never read, for any file.

    is_private     return whether a document's name says so
    PRIVATE_FILE   the reason that the user gets

Knows:  names.  Never: texts, files.
"""

import re
from urllib.parse import unquote

from fimserver.datatypes import NoCompletion

_PRIVATE = re.compile(
    r"/(?:"
    r"\.env[^/]*|[\w.-]+\.env|\.dev\.vars[^/]*|[._]netrc|\.pgpass|\.npmrc|\.pypirc|\.htpasswd|\.git-credentials|\.my\.cnf|\.s3cfg|\.boto"
    r"|\.dockercfg|\.dockerconfigjson|\.vault-token|\.(?:kube|aws)/config|\.docker/config\.json|[\w.-]*kubeconfig[\w.-]*"
    r"|\.config/gh/hosts\.ya?ml|(?:home|Users)/[^/]+/\.azure/.+|root/\.azure/.+|\.azure/[\w-]*(?:[tT]oken|[pP]rofile|credential|msal)\w*\.\w+|\.config/gcloud/.+|\.aws/sso/.+|\.kube/cache/.+|\.terraform\.d/.+|\.terraformrc"
    r"|[\w.-]+\.tfvars(?:\.json)?|wp-config[\w.-]*\.php|auth\.json|\.composer/auth\.json|\.netrc\.gpg|\.mylogin\.cnf"
    r"|\.(?:ba|z|k|c|tc|fi|da)?sh_history|\.(?:python|node_repl|psql|mysql|sqlite|rediscli|irb|lua|php|Rhistory)_?history"
    r"|\.viminfo|\.lesshst|ConsoleHost_history\.txt|fish_history|recentservers\.xml|sitemanager\.xml|\.?msmtprc|\.?fetchmailrc"
    r"|\.?secrets/.+|rclone\.conf|wpa_supplicant\.conf|etc/g?shadow-?|master\.key|\.rubygems/credentials"
    r"|[\w.-]*(?:credentials?|secrets?)(?:\.(?:json|toml|ya?ml|xml|ini|cfg|conf|properties|csv|txt|enc|db))?"
    r"|[\w.-]*(?:service[._-]?account|client[._-]?secret)[\w.-]*\.json"
    r"|\.(?:ssh|gnupg)/.+|id_(?:rsa|dsa|ecdsa|ed25519)(?:_sk)?(?:[.-][\w.-]*)?"
    r"|[\w.-]+\.(?:pem|key|p8|p12|pfx|pkcs12|jks|keystore|keytab|ppk|kdbx?|asc|gpg|pgp|ovpn|agekey|tfstate(?:\.backup)?)"
    r"(?:[.~_-]?(?:bak|backup|old|orig|copy|save|swp|\d{1,8}))?~?"
    r")\Z",
    re.IGNORECASE | re.DOTALL,
)
# Code and examples under such names, and translations.
_PUBLIC = re.compile(
    r"(?:secrets|\.azure)/(?:.*/)?[^/]+\.(?:py|pyi|js|jsx|ts|tsx|mjs|cjs|go|rs|java|kt|cs|rb|php|c|cc|cpp|h|hpp|swift|scala|ex|exs|lua|vue|"
    r"svelte|dart|css|html|md)$|[\w.-]*kubeconfig[\w.-]*\.(?:go|rs|py|ts|js|java|rb|cs|md)$|\.env\.(?:d\.ts|ts|js|example|sample|template)$"
    r"|(?:id_[\w-]+|\w+)\.pub$|id_\w+[\w-]*\.(?:go|rs|py|ts|js)$|/(?:locales?|i18n|lang|languages?|translations?)/.*\.json$"
    r"|wp-config-sample\.php$|example[\w.-]*\.tfvars$|[\w.-]+\.(?:tfvars|env)\.(?:example|sample|template)$|\.environment$"
    r"|[\w-]*\.(?:test|spec)\.json$",
    re.IGNORECASE | re.DOTALL,
)
PRIVATE_FILE = NoCompletion("private_file", "files that hold secrets (.env, keys, credentials) are never read")


def is_private(uri: str) -> bool:
    """Return whether a document's name says that it holds secrets; such a document is never read."""
    name = unquote(re.split(r"[?#]", uri, maxsplit=1)[0])
    return _PRIVATE.search(name) is not None and _PUBLIC.search(name) is None
